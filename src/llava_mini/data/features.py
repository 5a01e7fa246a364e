"""What the frozen vision tower says of images, kept on disk: computed once, read in every epoch.

Features are those of ``encode_views``, bit for bit as they were computed: nothing is augmented, so an image gives the
same ones each time. A folder holds, for each combination of preprocessing, tower and number format, a folder of its own
with ``about.json`` and safetensors files of some hundred images each, in which the features of an image have the
SHA-256 of its file as their name. A file appears when it is complete; what was cut off goes on where it was.

Shapes: the features of an image are [V, P, E], 1.18 MB for CLIP ViT-L at 336 px in bfloat16.
"""

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModel

from llava_mini.data.mixture import Mixture
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import MediaFile, Sample
from llava_mini.model.vision import encode_views
from llava_mini.processor.image import ImageMode, ViewSettings, existing_file, make_views, to_rgb
from llava_mini.processor.processor import LlavaMiniProcessor

IMAGES_PER_FILE = 512
"""600 MB at full size. As many are lost when a run is cut off."""

_VERSION = 1
"""Of the files."""
_OPEN_FILES = 64
"""Of one reader. Each is a map of memory, not a copy."""


@dataclass(frozen=True, kw_only=True)
class FeatureKind:
    """All that the features of an image depend on besides its file."""

    size: int
    mode: ImageMode
    ratio: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tower: str
    """Digest of the tower's configuration and weights."""
    dtype: str
    """Of the tower, and of its features."""
    shape: tuple[int, int, int]
    """V, P and E."""

    @classmethod
    def of(cls, tower: CLIPVisionModel, processor: LlavaMiniProcessor) -> "FeatureKind":
        """Return what a tower makes of the pictures of a processor. Its weights are read once."""
        ratio = processor.resolution_ratio
        return cls(
            size=processor.image_size,
            mode=processor.image_mode,
            ratio=ratio,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            tower=_digest_of_tower(tower),
            dtype=str(tower.dtype).removeprefix("torch."),
            shape=(1 if ratio == 1 else ratio**2 + 1, _num_patches(tower), tower.config.hidden_size),
        )

    @property
    def fingerprint(self) -> str:
        """A digest of all fields."""
        return hashlib.sha256(json.dumps([_VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()[:32]

    @property
    def num_bytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.shape)) * getattr(torch, self.dtype).itemsize

    @property
    def views(self) -> ViewSettings:
        """How pictures are made ready."""
        return ViewSettings(size=self.size, mode=self.mode, ratio=self.ratio, mean=self.mean, std=self.std)


def _num_patches(tower: CLIPVisionModel) -> int:
    return (cast(int, tower.config.image_size) // cast(int, tower.config.patch_size)) ** 2


def _digest_of_tower(tower: CLIPVisionModel) -> str:
    facts = {key: value for key, value in tower.config.to_dict().items() if key in _TOWER_FACTS}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_TOWER_FACTS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "num_hidden_layers", "image_size", "patch_size")
"""Of the configuration: what the weights do not show."""


def content_key(medium: MediaFile) -> str:
    """The SHA-256 of an image's file.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    source = medium.source
    if isinstance(source, str) and source.startswith("data:"):
        source = source.encode()
    try:
        content = source if isinstance(source, bytes) else existing_file(source, "image").read_bytes()
    except OSError as error:
        raise ValueError(f"The file {medium} cannot be read ({error.strerror}). Change its permissions.") from error
    return hashlib.sha256(content).hexdigest()


class FeatureStore:
    """Features in a folder, by image. Can be pickled to the processes that make batches."""

    def __init__(self, folder: Path, kind: FeatureKind) -> None:
        """See what is there; nothing of it is read yet.

        Args:
            folder: As given to ``write_features``.
            kind: Of the features that are wanted.

        Raises:
            ValueError: A file is damaged, or there are no features of this kind in the folder.
        """
        self.folder, self.kind = folder / kind.fingerprint, kind
        if not self.folder.is_dir():
            raise ValueError(_lacking(folder, kind))
        self._files = sorted(self.folder.glob("*.safetensors"))
        names, places = [], []
        for number, path in enumerate(self._files):
            with _whole(path) as file:
                found = list(file.keys())
            names += found
            places += [number] * len(found)
        order = np.argsort(np.array(names, dtype="S64"), kind="stable")
        self._names = np.array(names, dtype="S64")[order]
        self._places = np.array(places, dtype=np.int32)[order]
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._names)

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, medium: MediaFile) -> Tensor:
        """The features of an image: [V, P, E].

        Raises:
            ValueError: There are none, or the image's file does not exist.
        """
        key = content_key(medium)
        place = self._place(key)
        if place is None:
            raise ValueError(
                f"The features of {medium} are not in {str(self.folder)!r}. Was the image changed or added later? "
                "Write the features again: only missing ones are computed."
            )
        return self._file(place).get_tensor(key)

    def _place(self, key: str) -> int | None:
        name = np.bytes_(key.encode())
        index = int(np.searchsorted(self._names, name))
        return int(self._places[index]) if index < len(self._names) and self._names[index] == name else None

    def _file(self, number: int) -> Any:
        if number not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[number] = _whole(self._files[number])
        self._open.move_to_end(number)
        return self._open[number]


def _whole(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The file of features {str(path)!r} is damaged ({error}). Delete it and write the features again: only "
            "missing ones are computed."
        ) from error


def _lacking(folder: Path, kind: FeatureKind) -> str:
    """Say what a folder holds in place of the features that are wanted."""
    others = [json.loads(path.read_text(encoding="utf-8"))["kind"] for path in sorted(folder.glob("*/about.json"))]
    if not others:
        return f"There are no features in {str(folder)!r}. Write them first, with llava-mini data features."
    wanted = json.loads(json.dumps(asdict(kind)))
    differ = [name for name, value in wanted.items() if others[0].get(name) != value]
    told = "; ".join(f"{name} {others[0].get(name)} instead of {wanted[name]}" for name in differ)
    return (
        f"The features in {str(folder)!r} are of another tower or preprocessing: {told}. Write those of this model; "
        "the others can stay in the folder."
    )


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """What writing features will do and cost."""

    folder: Path
    kind: FeatureKind
    missing: tuple[tuple[str, MediaFile], ...]
    """Keys and images whose features are to be computed."""
    num_present: int
    """Images whose features are there."""
    damaged: tuple[Damaged, ...]
    """Images that do not exist or cannot be read."""
    free: int
    """Bytes on the disk."""

    @property
    def num_bytes(self) -> int:
        """That will be written."""
        return len(self.missing) * self.kind.num_bytes

    def __str__(self) -> str:
        """One sentence for people."""
        number = len(self.missing)
        return (
            f"{number} images to compute at {self.kind.num_bytes / 1e6:.3g} MB each: {self.num_bytes / 1e9:.3g} GB in "
            f"{str(self.folder)!r}, where {self.free / 1e9:.3g} GB are free. {self.num_present} images are there "
            + (f"already, and {len(self.damaged)} cannot be read." if self.damaged else "already.")
        )

    def check(self) -> None:
        """Refuse to begin what does not fit.

        Raises:
            ValueError: It does not.
        """
        if self.num_bytes > self.free * _USABLE:
            raise ValueError(
                f"The features do not fit on the disk: {self} Free some, give a folder on another disk, or train "
                "without them."
            )


_USABLE = 0.95
"""Share of the free space that may be filled: headers of files, and whoever else writes."""


def plan_features(images: Iterable[MediaFile], folder: Path, kind: FeatureKind) -> FeaturePlan:
    """Read all images once, as bytes, and see which features are missing.

    Args:
        images: May name one several times; equal files count once.
        folder: Is made if it is missing.
        kind: From ``FeatureKind.of``.

    Raises:
        ValueError: The folder cannot be made, or a file in it is damaged.
    """
    try:
        (folder / kind.fingerprint).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{str(folder)!r} cannot be made ({error.strerror}). Give a folder for the features."
        ) from error
    store = FeatureStore(folder, kind)
    distinct = {str(image.source) if not isinstance(image.source, bytes) else image.source: image for image in images}
    missing: dict[str, MediaFile] = {}
    present: set[str] = set()
    damaged = []
    with ThreadPoolExecutor() as pool:
        for image, key in zip(distinct.values(), pool.map(_key_or_reason, distinct.values()), strict=True):
            if isinstance(key, Damaged):
                damaged.append(key)
            elif key in store:
                present.add(key)
            else:
                missing.setdefault(key, image)
    return FeaturePlan(
        folder=folder,
        kind=kind,
        missing=tuple(missing.items()),
        num_present=len(present),
        damaged=tuple(damaged),
        free=shutil.disk_usage(folder).free,
    )


def _key_or_reason(image: MediaFile) -> str | Damaged:
    try:
        return content_key(image)
    except ValueError as error:
        return Damaged(id=str(image), media=str(image), reason=str(error))


def write_features(
    tower: CLIPVisionModel,
    plan: FeaturePlan,
    *,
    images_per_pass: int = 16,
    images_per_file: int = IMAGES_PER_FILE,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Damaged]:
    """Compute what is missing and write it.

    Args:
        tower: The one of the plan, on the device that computes.
        plan: From ``plan_features``; what it costs is checked again.
        images_per_pass: Images that go through the tower together. It may change the last bits of what is computed, as
            it does in training.
        images_per_file: Images in a file.
        progress: Is told how many more images are done.

    Returns:
        Images that could not be decoded, and those that the plan could not read.

    Raises:
        ValueError: It does not fit on the disk, or the tower is another.
        OSError: The disk is full or fails. What is written stays.
    """
    plan.check()
    kind = plan.kind
    if _digest_of_tower(tower) != kind.tower:
        raise ValueError("The tower is not the one that the features were planned for. Make a new plan.")
    home = plan.folder / kind.fingerprint
    _write_about(home, kind, tower)
    damaged = list(plan.damaged)
    keys: list[str] = []
    computed: list[Tensor] = []

    def write_file() -> None:
        if keys:
            _write_file(home, dict(zip(keys, torch.cat(computed).unbind(), strict=True)), kind)
            progress(len(keys))
        keys.clear()
        computed.clear()

    for group in _decoded(plan, images_per_pass):
        sound = [(key, pixels) for key, pixels in group if isinstance(pixels, Tensor)]
        damaged += [pixels for _, pixels in group if isinstance(pixels, Damaged)]
        progress(len(group) - len(sound))
        if not sound:
            continue
        keys += [key for key, _ in sound]
        computed.append(_encode(tower, torch.stack([pixels for _, pixels in sound])))
        if len(keys) >= images_per_file:
            write_file()
    write_file()
    return damaged


def _encode(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Features of images on the CPU: [N, V, 3, S, S] to [N, V, P, E]."""
    with torch.inference_mode():
        features = encode_views(tower, pixels.flatten(0, 1).to(tower.device))
        return features.unflatten(0, pixels.shape[:2]).cpu()


def _decoded(plan: FeaturePlan, size: int) -> Iterator[list[tuple[str, Tensor | Damaged]]]:
    """Missing images with their pixels in groups, decoded by threads while the tower computes."""
    views = plan.kind.views

    def read(image: MediaFile) -> Tensor | Damaged:
        try:
            return make_views(to_rgb(image.source), views)  # pyright: ignore[reportArgumentType]
        except ValueError as error:
            return Damaged(id=str(image), media=str(image), reason=str(error))

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        waiting = iter(plan.missing)
        ahead: list[list[tuple[str, Future[Tensor | Damaged]]]] = []
        try:
            while True:
                while len(ahead) < 2 and (group := list(islice(waiting, size))):
                    ahead.append([(key, pool.submit(read, image)) for key, image in group])
                if not ahead:
                    return
                yield [(key, future.result()) for key, future in ahead.pop(0)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_file(home: Path, tensors: dict[str, Tensor], kind: FeatureKind) -> None:
    """Write a file, whole or not at all. Its name follows from its images: processes with equal ones write it alike."""
    name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
    draft = home / f".{name}.{os.getpid()}.part"
    try:
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, draft, metadata={"kind": kind.fingerprint})
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(home / f"{name}.safetensors")
    except SafetensorError as error:  # its name for what the system says
        raise OSError(f"Features cannot be written to {str(home)!r}: {error}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _write_about(home: Path, kind: FeatureKind, tower: CLIPVisionModel) -> None:
    """Say what the folder holds, for people and for the refusal of other kinds."""
    facts = {"version": _VERSION, "kind": asdict(kind), "device": tower.device.type, "torch": torch.__version__}
    draft = home / f".about.json.{os.getpid()}.part"
    draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draft.replace(home / "about.json")


def images_in(mixture: Mixture) -> Iterator[MediaFile]:
    """The images of samples without videos. Malformed records are left out, as in training."""
    for number in range(len(mixture)):
        sample = mixture.sample(number)
        if isinstance(sample, Sample) and sample.kind in ("image", "multi-image"):
            yield from sample.media
