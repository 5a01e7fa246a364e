"""Write any known layout as ours, tensor by tensor, in the dtypes of the source."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from safetensors import SafetensorError

from llava_mini.checkpoint.companions import write_companions
from llava_mini.checkpoint.from_llava import start_llava_mini
from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.source import Source, check_complete, read_source
from llava_mini.checkpoint.tensors import size_in_bytes, write_shards
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

MAX_SHARD_SIZE = "5GB"

_MARGIN = 64 * 2**20
"""Bytes for everything that is not a tensor."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    reducer: str | None = None,
    reducer_grid: int = 1,
    reducer_tokens: int | None = None,
    prefusion_num_layers: int | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a model, found in any known layout, in ours.

    Known are the released layout, ours, what ``export`` wrote, adapters (``mm_projector.bin``, or a LoRA with
    ``non_lora_trainables.bin``) with a base, LLaVA-1.5 as its authors and as transformers publish it, MQT-LLaVA and
    TokenPacker. Memory holds at most one shard. The destination appears when it is complete; a conversion that was
    interrupted starts anew.

    Args:
        source: a folder, or a name on the hub.
        destination: a folder that does not exist yet.
        base: for an adapter, the model that it belongs to.
        vision_tower: the folder of a CLIP model, where the source has none.
        reducer: start a new LLaVA-Mini from LLaVA-1.5, with this reducer.
        reducer_grid: of the new model.
        reducer_tokens: of the new model, where tokens form no grid. None: as in the source.
        prefusion_num_layers: of the new model; copies of the language model's first layers.
        max_shard_size: bytes, or as in "5GB".

    Returns:
        The destination.

    Raises:
        ValueError: the source is unknown, incomplete or does not fit its configuration; the destination exists,
            cannot be written, or has too little space; or the new model cannot be made of it.
    """
    if reducer_tokens is not None and reducer is None:
        raise ValueError(f"reducer_tokens is {reducer_tokens}, but no reducer is named that would make so many.")
    destination = Path(destination).expanduser()
    check_destination(destination)
    folder = locate(source)
    found = read_source(folder, base=base, vision_tower=vision_tower)
    if reducer is not None or prefusion_num_layers is not None:
        found.tensors, found.config = start_llava_mini(
            found.tensors,
            found.config,
            reducer=reducer if reducer is not None else found.config.reducer,
            reducer_grid=reducer_grid,
            reducer_tokens=reducer_tokens,
            prefusion_num_layers=prefusion_num_layers or 0,
        )
        check_complete(found.tensors, found.config, folder)
    with complete_or_nothing(destination, size_in_bytes(found.tensors)) as new:
        write_config(found, new)
        write_companions(found, new)
        write_shards(found.tensors, new, found.finish, max_shard_size)
    return destination


def write_config(source: Source, folder: Path) -> None:
    """Write config.json, with the dtype of the language model."""
    config = deepcopy(source.config)
    config.architectures = [LlavaMiniForConditionalGeneration.__name__]
    config.dtype = dtype_name(source)
    config.save_pretrained(folder)


def dtype_name(source: Source) -> str:
    """The dtype of the language model, as configurations write it."""
    return str(source.tensors["language_model.model.embed_tokens.weight"].dtype).removeprefix("torch.")


def check_destination(destination: Path) -> None:
    """Refuse a destination that exists.

    Raises:
        ValueError: it does.
    """
    if destination.exists():
        raise ValueError(f"{str(destination)!r} exists already. Give another destination, or remove it first.")


@contextmanager
def complete_or_nothing(destination: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder beside ``destination``, which takes its place if all goes well and otherwise disappears.

    Args:
        destination: does not exist.
        num_bytes: what the tensors will take.

    Raises:
        ValueError: the place cannot be written, or is too small.
    """
    temporary = destination.with_name(f".{destination.name}.incomplete")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < num_bytes + _MARGIN:
            raise ValueError(
                f"{str(destination)!r} needs {_gigabytes(num_bytes + _MARGIN)} of disk, but {_gigabytes(free)} are "
                "free there. Make room, or give a destination on another disk."
            )
        yield temporary
        temporary.rename(destination)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{str(destination)!r} cannot be written ({reason}). Is there room, and may you write there?"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
