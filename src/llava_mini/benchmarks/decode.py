"""Video on its way to the model: frames per second decoded, and decoded and made ready.

Question: how fast do frames come out of a film, and what does making them ready for the model add?
Expected: where a few frames of a film are seen, the frames between them still cost decoding; resizing and
          normalising a frame costs less than decoding it.
Run:      llava-mini bench decode

The film is made here: a moving pattern with noise, so that the codec has work to do.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from llava_mini.benchmarks.report import Report, Table, spread, told
from llava_mini.benchmarks.sizes import size_config
from llava_mini.benchmarks.timing import seconds_of, take_turns
from llava_mini.checkpoint.locate import locate
from llava_mini.evaluation.environment import environment
from llava_mini.flow import FrameChunk
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.video import FrameSampling, frames_of

if TYPE_CHECKING:
    from av.video.stream import VideoStream

CPU = torch.device("cpu")
WAVES = ((3, 50), (5, 90), (2, 30))
"""Of each colour of the film: pixels that it moves in a frame, and length of a wave down the picture."""
NOISE_SHIFTS = 97
"""How many places the noise can lie at."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The film, and the pixels that the model reads."""

    size: str = "7b"
    """tiny, middle, 7b or 8b: pixels per side of a frame, for the model."""
    width: int = 1280
    """Of the film, in pixels."""
    height: int = 720
    """Of the film, in pixels."""
    rate: int = 30
    """Frames of the film per second."""
    seconds: int = 10
    """Its length."""
    codec: str = "libx264"
    """A video encoder of FFmpeg."""
    repeats: int = 5
    """Rounds that are counted."""
    warmup: int = 1
    """Rounds before them that are not."""

    def __post_init__(self) -> None:
        size_config(self.size)
        least = {"width": 16, "height": 16, "rate": 1, "seconds": 1, "repeats": 1, "warmup": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}.")
        if self.width % 2 or self.height % 2:
            raise ValueError(f"Films have even sides, got {self.width} x {self.height}.")


def run(settings: Settings) -> Report:
    """Make the film and read it in all ways, in turns.

    Raises:
        ValueError: PyAV is missing, or has no such encoder.
    """
    if importlib.util.find_spec("av") is None:
        raise ValueError("Decoding video needs PyAV, which is not installed. Install it: pip install av")
    processor = LlavaMiniProcessor.from_pretrained(locate("tiny"))
    processor.image_size = size_config(settings.size).image_size
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        write_film(film, settings)
        size = film.stat().st_size
        ways = _ways(film, processor)
        num_frames = {name: way() for name, way in ways.items()}
        seconds = take_turns(
            {name: lambda way=way: seconds_of(way, CPU) for name, way in ways.items()},
            warmup=settings.warmup,
            repeats=settings.repeats,
        )
    results = {
        "ways": {
            name: {"frames": num_frames[name], "seconds": times, "frames_per_second": num_frames[name] / _median(times)}
            for name, times in seconds.items()
        },
        "image_size": processor.image_size,
        "film_bytes": size,
    }
    return Report(
        bench="decode",
        environment={**environment(CPU, torch.float32), "av": _version()},
        settings=vars(settings),
        results=results,
        tables=tables(results, settings),
    )


def tables(results: Mapping[str, Any], settings: Settings) -> list[Table]:
    """Put results into words."""
    film = f"{settings.width} x {settings.height} at {settings.rate} frames/s, {settings.codec}"
    return [
        Table(
            title=f"{settings.seconds} s of film, {film}, {results['film_bytes'] / 1e6:.1f} MB; frames for the model "
            f"of {results['image_size']} px",
            columns=("way", "frames", "ms, median (quartiles)", "frames/s", "times real time"),
            rows=[
                (
                    name,
                    str(one["frames"]),
                    told([1e3 * seconds for seconds in one["seconds"]], 0),
                    f"{one['frames_per_second']:.1f}",
                    f"{settings.seconds / _median(one['seconds']):.1f}",
                )
                for name, one in results["ways"].items()
            ],
        )
    ]


def write_film(path: Path, settings: Settings) -> None:
    """A pattern that moves one way under noise that differs from frame to frame.

    Raises:
        ValueError: PyAV has no such encoder, or it does not make such films.
    """
    from av.error import FFmpegError

    try:
        _encode(path, settings)
    except FFmpegError as error:
        raise ValueError(
            f"The encoder {settings.codec} makes no film of {settings.width} x {settings.height} pixels at "
            f"{settings.rate} frames/s ({error.strerror}). Try another size, rate or codec."
        ) from error


def _encode(path: Path, settings: Settings) -> None:
    import av

    random = np.random.default_rng(0)
    noise = random.integers(0, 12, (settings.height, settings.width + NOISE_SHIFTS, 1), dtype=np.uint8)
    rows, columns = np.arange(settings.height)[:, None], np.arange(settings.width)[None, :]
    with av.open(str(path), "w") as container:
        try:
            found = container.add_stream(settings.codec, rate=settings.rate)
        except ValueError as error:
            raise ValueError(f"PyAV has no encoder {settings.codec!r}. Try libx264 or mpeg4.") from error
        if found.type != "video":
            raise ValueError(f"{settings.codec!r} is no encoder of video but of {found.type}. Try libx264 or mpeg4.")
        stream = cast("VideoStream", found)
        stream.width, stream.height, stream.pix_fmt = settings.width, settings.height, "yuv420p"
        for index in range(settings.rate * settings.seconds):
            colours = [
                110 + 90 * np.sin((columns + pace * index) / 40) * np.cos(rows / length) for pace, length in WAVES
            ]
            shift = int(random.integers(NOISE_SHIFTS))
            picture = np.stack(colours, axis=-1).astype(np.uint8) + noise[:, shift : shift + settings.width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _ways(film: Path, processor: LlavaMiniProcessor) -> dict[str, Callable[[], int]]:
    """Each reads the film once and gives the number of its frames."""
    content = [{"type": "video", "path": str(film)}, {"type": "text", "text": "What moves?"}]
    messages = [{"role": "user", "content": content}]

    def plain() -> int:
        import av

        with av.open(str(film)) as container:
            return sum(1 for frame in container.decode(video=0) if frame.to_ndarray(format="rgb24").size)

    def decoded(sampling: FrameSampling) -> int:
        return sum(1 for _ in frames_of(film, sampling))

    def ready(all_frames: bool) -> int:
        chunks = cast("Iterator[FrameChunk]", processor.stream(messages, all_frames=all_frames).pixel_values)
        return sum(len(chunk.pixel_values) for chunk in chunks)

    return {
        "PyAV alone, every frame": plain,
        "frames_of, every frame": lambda: decoded(FrameSampling(all_frames=True)),
        "processor.stream, every frame": lambda: ready(True),
        "frames_of, one per second": lambda: decoded(FrameSampling()),
        "processor.stream, one per second": lambda: ready(False),
    }


def _median(times: list[float]) -> float:
    return spread(times)["median"]


def _version() -> str:
    import av

    return av.__version__
