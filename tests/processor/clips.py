"""Small videos for tests. Frame i of a clip is grey of the value that ``shade`` gives, so a frame says which it is."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def shade(index: int, total: int) -> int:
    """The grey of frame ``index``, far enough from its neighbours' to survive a lossy codec for up to 60 frames."""
    return 20 + index * 216 // max(total - 1, 1)


def index_of(image: Image.Image, total: int) -> int:
    """Which frame of a clip of ``total`` frames this is."""
    grey = np.asarray(image).mean()
    return min(range(total), key=lambda index: abs(shade(index, total) - grey))


def write_clip(
    path: Path,
    total: int,
    *,
    rate: int = 10,
    size: tuple[int, int] = (32, 32),
    codec: str = "libx264",
    key_frames: int = 5,
    times: Sequence[int] = (),
    rotation: int = 0,
    **options: str,
) -> Path:
    """Write a video of ``total`` frames.

    Args:
        path: its name says the container.
        total: how many frames.
        rate: frames per second.
        size: width and height.
        codec: of the pictures.
        key_frames: every how many frames a key frame stands.
        times: when each frame is shown, in milliseconds, instead of at the rate.
        rotation: degrees that a player turns it by, counter-clockwise.
        options: of the codec.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = key_frames
        if rotation:
            stream.set_display_rotation(rotation)  # type: ignore[attr-defined]
        unit = Fraction(1, 1000 if times else rate)
        stream.codec_context.time_base = unit
        for index in range(total):
            pixels = np.full((size[1], size[0], 3), shade(index, total), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = unit
            frame.pts = times[index] if times else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
