"""From images and videos to what any question needs of their frames: from the cache where it knows them.

What the vision side and the text before the frames leave in pre-fusion is a function of a frame's pixels, of that
text and of the weights up to there, and of nothing else; above all not of the question. The key of a frame says
just that: a digest of its pixels as the vision tower reads them, after all preprocessing, a digest of the text's
embeddings, and one of the weights. A picture that was rotated, encoded anew or preprocessed in another way is another
picture.

Of files it remembers besides which frames they gave, so that a film is not decoded again. That memory goes by
name, inode, size and both time stamps of a file, and not at all by files that changed a moment ago.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from llava_mini.flow import FrameChunk, SeenChunk, SeenFrames, sent
from llava_mini.inference.ahead import Ahead
from llava_mini.inference.stats import Clock
from llava_mini.inference.tensor_cache import TensorCache, Tensors
from llava_mini.inference.weights import ModelState
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.media_stream import MediaStream

Kept = Literal["keys_values", "features"]
"""What is kept of a frame: all that a question needs, or the vision tower's output, from which that is made again."""

Count = Callable[[int, int | None], None]
"""Told the number of frames of a chunk, and of all frames of all media; None if that is not known yet."""

_SETTLED_NS = 2_000_000_000
"""Age of a file's last change before its time stamps can be trusted: a later change could carry the same ones."""

_MOST_FILES = 256
"""So many files are remembered."""


@dataclass
class Reading:
    """What one question has read so far."""

    keys: list[str] = field(default_factory=list)
    """Of each frame, in order."""
    num_cached: int = 0
    """Frames that need not go through the vision tower again."""


class FrameReader:
    """Reads frames for one model, through a cache."""

    def __init__(
        self, model: LlavaMiniForConditionalGeneration, state: ModelState, cache: TensorCache, kept: Kept
    ) -> None:
        self.model = model
        self.cache = cache
        self.kept: Kept = kept
        self._state = state
        self._pixels_of_file: dict[object, tuple[str, ...]] = {}
        self._lock = Lock()

    def read(
        self, media: MediaStream, text: Tensor, reading: Reading, clock: Clock, count: Count
    ) -> Generator[SeenChunk]:
        """Give the frames of all media as the model sees them, chunk by chunk.

        Args:
            media: what to read.
            text: [N, D], from ``model.text_before_frames``.
            reading: is told what was read.
            clock: is told the seconds of decoding, as far as it was waited for, of the cache, and of the vision side.
            count: called before the model works on a chunk.
        """
        turn = self.cache.new_turn()
        rest = self._rest(text)
        for slot in range(len(media)):
            fingerprint = _fingerprint(media, slot)
            known = self._pixels_of_file.get(fingerprint, ()) if fingerprint is not None else ()
            if known and not all(self._key(pixels, rest) in self.cache for pixels in known):
                known = ()
            pixels_seen: list[str] = []
            num_before, is_last = len(reading.keys), slot == len(media) - 1
            for start in range(0, len(known), self.model.frames_per_pass):
                pixels = known[start : start + self.model.frames_per_pass]
                found = clock.timed("media", self._find)([self._key(one, rest) for one in pixels], turn)
                whole = [tensors for tensors in found if tensors is not None]
                if len(whole) < len(found):
                    break  # a file of the cache was damaged
                count(len(pixels), num_before + len(known) if is_last else None)
                pixels_seen += pixels
                reading.num_cached += len(pixels)
                yield SeenChunk(seen=self._restored(whole, text, clock), slot=slot)
            if not known or len(pixels_seen) < len(known):
                for chunk, pixels in self._decoded(media, slot, clock, skip=len(pixels_seen)):
                    total = num_before + chunk.total if is_last and chunk.total is not None else None
                    count(len(pixels), total)
                    pixels_seen += pixels
                    yield SeenChunk(seen=self._see(chunk, pixels, rest, text, turn, reading, clock), slot=slot)
            if fingerprint is not None and _fingerprint(media, slot) == fingerprint:
                self._remember(fingerprint, pixels_seen)
            reading.keys += [self._key(pixels, rest) for pixels in pixels_seen]

    def keep(self, pixel_values: Tensor, text: Tensor) -> list[str]:
        """See frames [F, V, 3, H, W] after the text [N, D], keep them, and return the key of each."""
        rest, pixels = self._rest(text), _digests(pixel_values)
        chunk = FrameChunk(pixel_values=pixel_values, slot=0)
        self._see(chunk, pixels, rest, text, self.cache.new_turn(), Reading(), Clock({}, self.model.device))
        return [self._key(one, rest) for one in pixels]

    def recall(self, keys: Sequence[str], text: Tensor, clock: Clock) -> Iterator[SeenFrames]:
        """Give the frames that were kept under some keys, some at a time, and tell the clock how long it took.

        Raises:
            ValueError: one is not in the cache any more.
        """
        turn = self.cache.new_turn()
        for start in range(0, len(keys), self.model.frames_per_pass):
            found = clock.timed("media", self._find)(keys[start : start + self.model.frames_per_pass], turn)
            whole = [tensors for tensors in found if tensors is not None]
            if len(whole) < len(found):
                raise ValueError(
                    f"Frame {start + found.index(None)} of {len(keys)} is no longer in the cache, which has room for "
                    f"{self.cache.max_bytes} bytes in memory and {self.cache.folder or 'no folder'} on disk. Give the "
                    "engine a folder where it can keep all frames, or watch with a window."
                )
            yield self._restored(whole, text, clock)

    def _remember(self, fingerprint: object, pixels: list[str]) -> None:
        """Note which frames a file gave, and forget the file that was not asked about for longest."""
        with self._lock:
            self._pixels_of_file.pop(fingerprint, None)
            self._pixels_of_file[fingerprint] = tuple(pixels)
            while len(self._pixels_of_file) > _MOST_FILES:
                del self._pixels_of_file[next(iter(self._pixels_of_file))]

    def _decoded(
        self, media: MediaStream, slot: int, clock: Clock, skip: int
    ) -> Generator[tuple[FrameChunk, list[str]]]:
        """Chunks of frames with the digests of their pixels, without the first ``skip`` frames; films a chunk ahead."""
        ready = _digested(media.chunks(slot), skip)
        with closing(Ahead(ready) if media.is_film(slot) else ready) as chunks:
            waited = clock.timed("media", chunks.__next__)
            while True:
                try:
                    yield waited()
                except StopIteration:
                    return

    def _see(
        self,
        chunk: FrameChunk,
        pixels: list[str],
        rest: str,
        text: Tensor,
        turn: int,
        reading: Reading,
        clock: Clock,
    ) -> SeenFrames:
        """Return the frames of a chunk, from the cache or by the model; the same picture is seen once."""
        keys = [self._key(one, rest) for one in pixels]
        different = list(dict.fromkeys(keys))
        at_hand = zip(different, clock.timed("media", self._find)(different, turn), strict=True)
        found = {key: tensors for key, tensors in at_hand if tensors is not None}
        missing = [key for key in different if key not in found]
        reading.num_cached += len(keys) - len(missing)
        parts = [self._restored(list(found.values()), text, clock)] if found else []
        for start in range(0, len(missing), self.model.frames_per_pass):
            some = missing[start : start + self.model.frames_per_pass]
            rows = [keys.index(key) for key in some]
            pixel_values = clock.timed("media", sent)(chunk.pixel_values[rows], self.model.device)
            features = clock.timed("vision", self.model.encode_frames)(pixel_values)
            patches, reduced = clock.timed("reduction", self.model.reduce_frames)(features)
            parts.append(clock.timed("prefusion", self.model.read_first)(patches, reduced, text))
            for index, key in enumerate(some if self.cache.keeps_anything else ()):
                one = parts[-1].part(index, index + 1)
                kept = {"features": features[index : index + 1]} if self.kept == "features" else one.to_tensors()
                clock.timed("media", self.cache.put)(key, kept, turn)
        order = [*found, *missing]
        return SeenFrames.join(parts).take([order.index(key) for key in keys])

    def _find(self, keys: Sequence[str], turn: int) -> list[Tensors | None]:
        """What the cache has under some keys."""
        if not self.cache.keeps_anything:
            return [None] * len(keys)
        return [self.cache.get(key, turn) for key in keys]

    def _restored(self, frames: Sequence[Tensors], text: Tensor, clock: Clock) -> SeenFrames:
        """Return frames from what was kept of them, which goes to the model's device together."""
        tensors = clock.timed("media", self._together)(frames)
        if self.kept == "features":
            patches, reduced = clock.timed("reduction", self.model.reduce_frames)(tensors["features"])
            return clock.timed("prefusion", self.model.read_first)(patches, reduced, text)
        return SeenFrames.from_tensors(tensors)

    def _together(self, frames: Sequence[Tensors]) -> Tensors:
        if len(frames) == 1:
            return {name: sent(tensor, self.model.device) for name, tensor in frames[0].items()}
        return {name: sent(torch.cat([one[name] for one in frames]), self.model.device) for name in frames[0]}

    def _key(self, pixels: str, rest: str) -> str:
        return hashlib.blake2b(f"{pixels} {rest}".encode(), digest_size=20).hexdigest()

    def _rest(self, text: Tensor) -> str:
        """What a frame's key says besides its pixels: the model, and the text before the frames if that is kept."""
        state = self._state.frames(lasting=self.cache.folder is not None)
        return f"{state} {self.kept} {'' if self.kept == 'features' else _digest_of(text)}"


def _digested(chunks: Generator[FrameChunk], skip: int) -> Generator[tuple[FrameChunk, list[str]]]:
    """Each chunk with the digests of its frames, without the first ``skip`` frames of all."""
    with closing(chunks):
        for chunk in chunks:
            drop, skip = min(skip, len(chunk.pixel_values)), max(skip - len(chunk.pixel_values), 0)
            pixels = chunk.pixel_values[drop:]
            if len(pixels):
                yield FrameChunk(pixel_values=pixels, slot=chunk.slot, total=chunk.total), _digests(pixels)


def _digests(pixel_values: Tensor) -> list[str]:
    """Return a digest of each frame of [F, V, 3, H, W]."""
    facts = f"{pixel_values.dtype} {tuple(pixel_values.shape[1:])}"
    return [f"{facts} {_digest_of(frame)}" for frame in pixel_values]


def _digest_of(tensor: Tensor) -> str:
    values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=20).hexdigest()


def _fingerprint(media: MediaStream, slot: int) -> object | None:
    """Return what a file's frames depend on: the file as it is now, and how it is read. None: there is no telling."""
    source = media.source(slot)
    if not isinstance(source, str | Path) or str(source).startswith("data:"):
        return None
    path = Path(source).resolve()
    try:
        stat = path.stat()
    except OSError:
        return None
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < _SETTLED_NS:
        return None
    return (str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, media.facts(slot))
