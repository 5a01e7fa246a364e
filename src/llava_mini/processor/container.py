"""Files of films, opened by what is in them: FFmpeg would also take texts, playlists and noise by their names.

PyAV is imported when a film is opened: pictures, frames and training do without it.
"""

import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_FILM_FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv", "live_flv", "mpeg", "mpegts", "mpegtsraw", "asf"),
    *("asf_o", "ogg", "rm", "mxf", "gxf", "nut", "wtv", "swf", "dv", "ivf", "nsv", "nuv", "smk", "bink", "roq", "flic"),
    *("mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vvc", "evc", "av1", "obu", "vc1", "dirac", "mjpeg"),
    *("yuv4mpegpipe", "gif", "apng", "jpegxl_anim"),
)
"""FFmpeg's names of the formats in which a film is looked for. Playlists are none: they read other files."""

_SOUND_FORMATS = ("wav", "w64", "mp3", "flac", "aac", "aiff", "au", "amr", "ac3", "eac3", "caf", "ape", "wv", "dts")
"""Formats without pictures, known so that the refusal can say what the file is."""

PICTURE_ERRORS = (
    *(OSError, SyntaxError, EOFError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for damaged files."""


def film_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises for damaged files."""
    from av.error import FFmpegError

    return FFmpegError, OSError, IndexError


def open_film(path: Path) -> "InputContainer":
    """Open a file in which there is a video.

    Raises:
        ValueError: there is none, or none that can be decoded.
    """
    import av

    try:
        container = av.open(str(path), options={"format_whitelist": ",".join((*_FILM_FORMATS, *_SOUND_FORMATS))})
    except (*film_errors(), ValueError) as error:
        raise ValueError(f"The file {str(path)!r} {_kind_of_refused(path)}") from error
    try:
        picture_stream(container, path)
    except ValueError:
        container.close()
        raise
    return container


def picture_stream(container: "InputContainer", path: Path) -> "VideoStream":
    """The first stream with moving pictures, not a cover.

    Raises:
        ValueError: there is none, or FFmpeg has no decoder for it.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        content = "sound but no video" if container.streams.audio else "no video"
        raise ValueError(f"The file {str(path)!r} has {content}. Give a file with moving pictures.")
    if streams[0].codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]  # PyAV: where no decoder is
        raise ValueError(
            f"There is no decoder for this kind of video in {str(path)!r}. Convert it, for example to MP4; it may also "
            "be damaged."
        )
    return streams[0]


def is_film(path: Path) -> bool:
    """Whether a file is a video that can be opened."""
    try:
        with open_film(path):
            return True
    except ValueError:
        return False


def reason(error: Exception) -> str:
    """What an error says, without a full stop."""
    return (getattr(error, "strerror", None) or str(error)).strip().rstrip(".")


def not_a_picture(path: Path | None) -> str:
    """The end of a sentence about a file that is neither an image nor a video. None: it has no path."""
    side = "" if path is None else _empty_side(path)
    return f"is neither an image nor a video that can be read{side}. Is it damaged?"


def _kind_of_refused(path: Path) -> str:
    try:
        with Image.open(path):
            return "is an image, not a video. Give it as an image."
    except PermissionError:
        return "may not be read by this user. Change its permissions."
    except PICTURE_ERRORS:
        return not_a_picture(path)


def _empty_side(path: Path) -> str:
    """What a PNG without pixels says of itself: Pillow only says that it is no picture."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or not head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ""
    width, height = struct.unpack(">II", head[16:])
    return "" if width and height else f" (a PNG of {width} x {height} pixels: a side of 0 pixels)"
