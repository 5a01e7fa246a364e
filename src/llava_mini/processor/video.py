"""Video as a stream of frames: at any moment one decoded frame is in memory, however long the film.

A file is read twice. The first pass only lists its packets, which is cheap and exact where headers are
wrong or silent: how many frames there are, when each is shown, which are key frames. The second
decodes in one direction, skips ahead to key frames where that saves work, and stops after the last wanted frame.

Which frames are taken follows the released rule where frames come at a constant rate
(``choose_frames``); otherwise the same moments are looked up in the time stamps.
"""

import bisect
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_mini.processor.container import PICTURE_ERRORS, film_errors, open_film, picture_stream, reason
from llava_mini.processor.image import MAX_PIXELS, ImageSource, check_pixels, existing_file, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FILM_TIME_BASE = 1_000_000
"""FFmpeg's units of the length of a file in a second."""

VideoSource = str | Path | np.ndarray | Tensor | Sequence[ImageSource] | Iterator[ImageSource]
"""A file, an array [F, H, W, 3] or [F, 3, H, W], a list of pictures, or an iterator of pictures."""


@dataclass(frozen=True, kw_only=True)
class FrameSampling:
    """Which frames of a video are seen. At most one of the first three is given; none: one frame per second.

    A list, an array or an iterator has no known rate: all its frames are seen, unless ``num_frames`` says otherwise.
    """

    num_frames: int | None = None
    """As many frames, evenly spread. More than the video has: some are seen twice."""
    fps: float | None = None
    """Frames per second."""
    all_frames: bool = False
    """Every frame."""
    max_frames: int | None = None
    """Never more than this, evenly spread."""

    def __post_init__(self) -> None:
        if (self.num_frames is not None) + (self.fps is not None) + self.all_frames > 1:
            raise ValueError("num_frames, fps and all_frames exclude one another. Give one of them.")
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on.")
        if self.num_frames is not None:
            _check_number(self.num_frames, f"num_frames={self.num_frames}")
        if self.fps is not None and not (
            isinstance(self.fps, Real) and not isinstance(self.fps, bool) and 0 < self.fps < float("inf")
        ):
            raise ValueError(f"fps is {self.fps!r}; it must be a finite number above 0.")

    def count(self, total: int, seconds: float | None) -> int:
        """How many of ``total`` frames that last ``seconds`` (None: not known) are seen; at least one."""
        if self.all_frames or (seconds is None and self.num_frames is None and self.fps is None):
            wanted = total
        elif self.num_frames is not None:
            wanted = self.num_frames
        elif seconds is None:
            raise ValueError(
                f"fps={self.fps} was asked for, but a list of frames has no rate. Give num_frames, or a video file."
            )
        else:
            number = seconds * float(self.fps or 1)
            number = min(number, self.max_frames or number)
            _check_number(number, f"fps={self.fps or 1} of {seconds:.2f} s")
            wanted = max(int(number), 1)
        return min(wanted, self.max_frames or wanted)


_MOST_FRAMES = 1_000_000
"""Of one video: more than eleven days at one frame per second."""


def _check_number(number: float, what: str) -> None:
    if number > _MOST_FRAMES:
        raise ValueError(f"{what} asks for more than {_MOST_FRAMES} frames of a video. Give a smaller number.")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a video."""

    image: Image.Image
    """RGB, upright."""
    time: float | None
    """When it is shown, in seconds from the start. None: not known."""
    total: int | None = None
    """How many frames of the video are seen in all, if it is not damaged. None: not known."""


def spread(total: int, wanted: int) -> list[int]:
    """``wanted`` indices out of ``total``, in order: the middle of each of as many equal parts (released).

    The ends of the parts are rounded to whole frames, halves to even. The last frame is hardly ever taken, and
    ``wanted`` close to ``total`` repeats a frame.
    """
    ends = [round((total - 1) / wanted * part) for part in range(wanted + 1)]
    return [(start + end) // 2 for start, end in itertools.pairwise(ends)]


def choose_frames(total: int, average_fps: float, sampling: FrameSampling) -> list[int]:
    """Indices of the frames that are seen of a video with a constant rate: all of them above that rate.

    Args:
        total: how many frames it has.
        average_fps: frames per second.
        sampling: what is wanted.
    """
    if sampling.fps is not None and sampling.fps > average_fps:
        sampling = FrameSampling(all_frames=True, max_frames=sampling.max_frames)
    wanted = sampling.count(total, total / average_fps)
    return list(range(total)) if sampling.all_frames and wanted == total else spread(total, wanted)


def nearest_square(image: Image.Image, size: int) -> Image.Image:
    """A frame at ``size`` x ``size`` pixels by nearest neighbour, without regard to its proportions (released)."""
    rows, columns = (_nearest_indices(side, size) for side in (image.height, image.width))
    return Image.fromarray(np.asarray(image)[rows][:, columns])


def _nearest_indices(length: int, size: int) -> np.ndarray:
    ramp = torch.arange(length, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(ramp, size=size, mode="nearest")[0, 0].long().numpy()


def frames_of(
    source: VideoSource, sampling: FrameSampling, *, max_pixels: int = MAX_PIXELS, whole: bool = False
) -> Iterator[Frame]:
    """The frames of a video, one after another, decoded as they are asked for.

    A damaged video gives what comes before the damage, and a warning that says where that is.

    Args:
        source: the video.
        sampling: which frames.
        max_pixels: most pixels of a frame.
        whole: whether a damaged video is refused, after the last frame that can be seen, instead of a warning.

    Raises:
        ValueError: a file is missing or no video, has no picture or no frame; a list or an iterator is empty.
    """
    if isinstance(source, str | Path):
        return _file_frames(existing_file(source, "video"), sampling, max_pixels, whole)
    if isinstance(source, np.ndarray | Tensor):
        return _listed_frames(_array_frames(source), sampling, max_pixels)
    if isinstance(source, Iterator):
        return _iterated_frames(source, sampling, max_pixels)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return _listed_frames(source, sampling, max_pixels)
    raise ValueError(
        f"A {type(source).__name__} is not a video. Give a path, an array [F, H, W, 3], a list of frames or an "
        "iterator of frames."
    )


def kind_of_file(path: str | Path) -> str:
    """``"image"`` or ``"video"``, by looking into the file.

    An animated GIF is a video; other pictures with several pages or frames are images, their first one.

    Raises:
        ValueError: the file is missing, or it is neither.
    """
    path = existing_file(path, "image")
    try:
        with Image.open(path) as image:
            moving = image.format == "MPEG" or (image.format == "GIF" and getattr(image, "is_animated", False))
            return "video" if moving else "image"
    except Image.DecompressionBombError:
        return "image"
    except PICTURE_ERRORS:
        with open_film(path):
            return "video"


def _array_frames(array: np.ndarray | Tensor) -> Sequence[ImageSource]:
    if array.ndim != 4:
        raise ValueError(
            f"An array of shape {tuple(array.shape)} is not a video. Give [F, H, W, 3] or [F, 3, H, W]; an array with "
            "3 dimensions is an image."
        )
    return array  # pyright: ignore[reportReturnType]  # indexing gives frames


def _listed_frames(frames: Sequence[ImageSource], sampling: FrameSampling, max_pixels: int) -> Iterator[Frame]:
    total = len(frames)
    if total == 0:
        raise ValueError("The video has 0 frames: the list or array is empty. Give at least one frame.")
    wanted = sampling.count(total, None)
    indices = spread(total, wanted) if sampling.num_frames or wanted < total else range(total)
    return (
        Frame(image=to_rgb(frames[index], max_pixels=max_pixels), time=None, total=len(indices)) for index in indices
    )


def _iterated_frames(frames: Iterator[ImageSource], sampling: FrameSampling, max_pixels: int) -> Iterator[Frame]:
    if sampling.num_frames is not None or sampling.fps is not None:
        raise ValueError(
            "num_frames or fps was asked for, but an iterator of frames has neither a length nor a rate. Let it "
            "yield the frames that are to be seen."
        )
    empty = True
    for image in itertools.islice(frames, sampling.max_frames):
        empty = False
        yield Frame(image=to_rgb(image, max_pixels=max_pixels), time=None)
    if empty:
        raise ValueError(
            "The iterator of frames is empty. Was it used before? Give one that yields at least one frame."
        )


@dataclass(frozen=True, kw_only=True)
class _FrameTable:
    """What the packets of a file say. All in the order in which frames are shown."""

    times: list[int]
    """Time stamps in units of ``time_base``. Empty if the file has none."""
    key_times: list[int]
    """Those of key frames."""
    total: int
    time_base: Fraction
    fps: float | None
    """Frames per second if they come at a constant rate."""
    damage: str
    """Why the file ends early; empty if it does not."""
    end: int
    """When the last frame ceases to be shown, in units of ``time_base``."""
    spoilt: bool
    """Whether the container itself marks a part as lost or wrong."""

    @property
    def seconds(self) -> float:
        """How long the video lasts."""
        if not self.times:
            return self.total / self.fps if self.fps else float(self.total)
        return float((self.end - self.times[0]) * self.time_base)

    def choose(self, sampling: FrameSampling) -> list[int]:
        if self.fps:
            return choose_frames(self.total, self.fps, sampling)
        wanted = sampling.count(self.total, self.seconds)
        if (sampling.all_frames and wanted == self.total) or not self.times:
            return list(range(self.total)) if wanted == self.total else spread(self.total, wanted)
        part = (self.end - self.times[0]) / wanted
        moments = [self.times[0] + (index + 0.5) * part for index in range(wanted)]
        return [bisect.bisect_right(self.times, moment) - 1 for moment in moments]


def _list_frames(container: "InputContainer", stream: "VideoStream") -> _FrameTable:
    packets: list[tuple[int | None, bool]] = []
    end, damage, spoilt = 0, "", False
    try:
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.is_keyframe))
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
                spoilt |= packet.is_corrupt
    except film_errors() as error:
        damage = reason(error)
    time_base = stream.time_base or Fraction(1)
    times = sorted(pts for pts, _ in packets if pts is not None)
    complete = len(times) == len(packets) and len(set(times)) == len(times)
    if complete and times and not damage:
        damage = _missing_end(container, stream, float((end - times[0]) * time_base), len(times))
    if times and end <= times[-1]:  # how long the last frame is shown is not said: as long as the others
        end = times[-1] + (times[-1] - times[0]) // max(len(times) - 1, 1)
    return _FrameTable(
        times=times if complete else [],
        key_times=sorted(pts for pts, key in packets if key and pts is not None) if complete else [],
        total=len(packets),
        time_base=time_base,
        fps=_constant_rate(times if complete else [], end, time_base, stream),
        damage=damage,
        end=end,
        spoilt=spoilt,
    )


def _missing_end(container: "InputContainer", stream: "VideoStream", found: float, total: int) -> str:
    """What is missing if the file declares to be longer than its ``total`` frames last; empty if nothing is.

    A difference of four frames is not damage: some containers round, or do not say how long the last frame is shown.
    """
    if stream.duration and stream.time_base:
        declared = float(stream.duration * stream.time_base)
    elif container.duration and len(container.streams) == 1:
        declared = container.duration / FILM_TIME_BASE
    else:
        return ""
    missing = declared - found > max(0.02 * declared, 4 * found / total)
    return f"{found:.2f} of {declared:.2f} s are there" if missing else ""


def _constant_rate(times: list[int], end: int, time_base: Fraction, stream: "VideoStream") -> float | None:
    """Frames per second, or None if the time stamps and the end are not evenly spaced, to half a frame."""
    declared = float(stream.average_rate) if stream.average_rate else None
    if len(times) < 2:
        return declared
    step = (times[-1] - times[0]) / (len(times) - 1)
    if any(abs(time - times[0] - index * step) > max(step / 2, 1) for index, time in enumerate((*times, end))):
        return None
    measured = float(1 / (step * time_base))
    close = declared is not None and abs(declared - measured) < 0.01 * measured
    return declared if close else measured


def _file_frames(path: Path, sampling: FrameSampling, max_pixels: int, whole: bool) -> Iterator[Frame]:
    with open_film(path) as container:
        stream = picture_stream(container, path)
        if stream.width and stream.height:
            check_pixels(stream.width, stream.height, f"A frame of {str(path)!r}", max_pixels)
        table = _list_frames(container, stream)
    if table.total == 0:
        raise ValueError(f"The video {str(path)!r} has 0 frames. Is it cut short?")
    wanted = table.choose(sampling)
    shown = 0
    with _Decoder(path, table) as decoder:
        for index, repeats in itertools.groupby(wanted):
            frame = decoder.frame(index)
            reached = frame is not None
            if not reached and not shown:
                frame = decoder.last
            if frame is None:
                break
            check_pixels(frame.width, frame.height, f"A frame of {str(path)!r}", max_pixels)
            try:
                at = decoder.seconds(index) if reached else decoder.reached
                picture = Frame(image=upright(frame), time=at, total=len(wanted))
            except film_errors() as error:  # colours that do not exist
                decoder.damage = reason(error)
                break
            for _ in repeats if reached else (index,):
                shown += 1
                yield picture
            if not reached:
                break
    damage = decoder.damage or table.damage
    if not shown:
        raise ValueError(f"No frame of the video {str(path)!r} can be decoded ({damage or 'no data'}). Is it damaged?")
    if damage:
        found = (
            f"The video {str(path)!r} is damaged after {decoder.reached:.2f} s ({damage}): {shown} frames before that "
            "are seen."
        )
    elif table.spoilt:
        found = (
            f"The video {str(path)!r} marks a part of itself as lost or damaged: some of the {shown} frames that are "
            "seen may be wrong."
        )
    else:
        return
    if whole:
        raise ValueError(f"{found} Get the file again.")
    warnings.warn(found, stacklevel=2)


class _Decoder:
    """Decodes forwards; asked for frames in rising order."""

    def __init__(self, path: Path, table: _FrameTable) -> None:
        self.path, self.table = path, table
        self.reached = 0.0
        self._jumps, self._careful = bool(table.times), False
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def frame(self, index: int) -> "VideoFrame | None":
        """The frame with this number, or None if the video is damaged before it."""
        jumped = self._jump_towards(index)
        self._advance(index)
        missed = self._position < index or (jumped and self._position > index)  # damage, or seeking is not exact
        if missed and not self._careful:
            self._container.close()
            self._careful = True
            self._start()
            self._advance(index)
        return self.last if self._position >= index else None

    def seconds(self, index: int) -> float:
        """When frame ``index`` is shown."""
        times = self.table.times
        if times:
            return float((times[index] - times[0]) * self.table.time_base)
        return index / self.table.fps if self.table.fps else float(index)

    def _start(self) -> None:
        self.damage = ""
        self._container = open_film(self.path)
        self._stream = picture_stream(self._container, self.path)
        self._stream.thread_type = "SLICE" if self._careful else "AUTO"  # threads lose whole frames at the damage
        self._frames = self._decode()
        self._position = -1
        self.last: VideoFrame | None = None

    def _advance(self, index: int) -> None:
        while self._position < index:
            frame = next(self._frames, None)
            if frame is None:
                self.damage = self.damage or self.table.damage or "the frames after it cannot be decoded"
                return
            self._position = self._number(frame)
            self.reached = self.seconds(min(self._position, self.table.total - 1))
            self.last = frame

    def _number(self, frame: "VideoFrame") -> int:
        times = self.table.times
        if times and frame.pts is not None:
            return max(bisect.bisect_right(times, frame.pts) - 1, 0)
        return self._position + 1

    def _jump_towards(self, index: int) -> bool:
        """Go to the last key frame up to the wanted one, if that skips frames."""
        times, keys = self.table.times, self.table.key_times
        if not self._jumps or self._careful or index - self._position < _WORTH_A_JUMP:
            return False
        key = bisect.bisect_right(keys, times[index]) - 1
        if key < 0 or bisect.bisect_left(times, keys[key]) <= self._position + 1:
            return False
        try:
            self._container.seek(keys[key], stream=self._stream)
        except film_errors():
            self._jumps = False
            return False
        self._frames = self._decode()
        return True

    def _decode(self) -> Iterator["VideoFrame"]:
        try:
            yield from self._container.decode(self._stream)
        except film_errors() as error:
            self.damage = reason(error)
            yield from self._held_back()

    def _held_back(self) -> Iterator["VideoFrame"]:
        """Frames before the damage that the decoder keeps in order to sort them."""
        try:
            yield from self._stream.codec_context.decode(None)
        except film_errors():
            return


_WORTH_A_JUMP = 8
"""Fewest frames between two wanted ones for which a jump to a key frame is tried."""


def upright(frame: "VideoFrame") -> Image.Image:
    """The frame as RGB, turned as its display matrix says."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def chunks(frames: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most ``size`` frames."""
    frames = iter(frames)
    while chunk := list(itertools.islice(frames, size)):
        yield chunk
