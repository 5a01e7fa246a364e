"""What a model's name means: the embedded model, a folder, or a repository on the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from llava_mini.config import PRESETS

EMBEDDED: dict[str, str] = {"tiny": "assets/tiny"}
"""Models that come with this package, and their folders in it."""

PUBLISHED = ("ICTNLP/llava-mini-llama-3.1-8b",)
"""Models that the authors published on the hub."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.msgpack", "*.h5"]


def locate(name: str | Path) -> Path:
    """The folder of a model, downloaded from the hub (and kept in its cache) if it has to be.

    Args:
        name: "tiny" for the embedded model, a folder, or "organisation/name" on the hub.

    Raises:
        ValueError: the name is none of these (the message lists the known ones), or the hub cannot be reached or
            does not have it.
    """
    text = str(name)
    if text in EMBEDDED:
        folder = Path(__file__).parents[1] / EMBEDDED[text]
        if not (folder / "config.json").exists():
            raise ValueError(
                f"The embedded model {text!r} is missing from this installation. Install llava-mini again."
            )
        return folder
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if text and path.exists():
        raise ValueError(f"{text!r} is a file. Give the folder of the model.")
    if isinstance(name, str) and _HUB_NAME.fullmatch(text):
        return _download(text)
    if text in PRESETS:
        raise ValueError(
            f"{text!r} names the sizes of a model, not weights. Give a folder or a name on the hub. llava-mini info "
            f"{text} shows what it would cost."
        )
    raise ValueError(
        f"There is no model {text!r}: it is neither a folder, nor a name on the hub (organisation/name), nor a known "
        f"model. Known models: {', '.join([*EMBEDDED, *PUBLISHED])}."
    )


def _download(name: str) -> Path:
    """Safetensors files, or ``.bin`` files where there are no others."""
    try:
        folder = Path(snapshot_download(name, ignore_patterns=_PICKLED))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["*.bin", "*.json"])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not a folder here, and cannot be downloaded from the hub ({type(error).__name__}). Check the "
            "name and the network, or download it elsewhere and give its folder."
        ) from error
    return folder
