"""Frames of a camera, of a network stream, or of a file as if it were one: now and then one, as time goes by.

A thread reads the source at its own pace. Frames wait in a short line; when whoever looks at them is slow, the oldest
are dropped and counted, so that what is seen stays recent and memory stays what it is.
"""

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Self

from PIL import Image

from llava_mini.processor.container import film_errors, open_film, picture_stream, reason
from llava_mini.processor.image import MAX_PIXELS, check_pixels, existing_file
from llava_mini.processor.video import upright

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_NETWORK = ("rtsp", "rtsps", "rtmp", "rtp", "udp", "tcp", "srt", "http", "https")
"""What the address of a network stream begins with."""

_OPEN_SECONDS, _SILENCE_SECONDS = 10.0, 15.0
"""How long a network stream may take to answer, and to send something."""

_LEAVE_SECONDS = 2.0
"""How long leaving waits for the thread."""

_RECONNECT_SECONDS = 60.0
"""How long a lost network stream is tried again."""


@dataclass(frozen=True, kw_only=True)
class LiveFrame:
    """One frame of a stream."""

    image: Image.Image
    """RGB, upright."""
    time: float
    """Seconds since the watching began, by the clock; in a file since its first frame, by its time stamps."""


class LiveSource:
    """A stream that is read in a thread while its context lasts."""

    def __init__(self, source: str | Path, *, fps: float = 1.0, waiting: int = 8, speed: float = 1.0) -> None:
        """Prepare; nothing is opened yet.

        Args:
            source: ``rtsp://...`` or another network stream, ``camera:0`` or ``/dev/video0``, or a video file.
            fps: Frames per second of stream time that are looked at; fewer if the stream has fewer.
            waiting: Most frames in line.
            speed: How much faster than in reality a file is played.

        Raises:
            ValueError: If a number is out of range, or there is no such file.
        """
        for name, value in (("fps", fps), ("speed", speed)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}.")
        if waiting < 1:
            raise ValueError(f"At least one frame has to wait in line, got waiting={waiting}.")
        self.source = str(source)
        self.is_file = not self.source.startswith(tuple(f"{name}://" for name in _NETWORK)) and not _camera(self.source)
        if self.is_file:
            existing_file(self.source, "video")
        elif speed != 1:
            raise ValueError(f"Only a file is played at another speed, but {self.source!r} is live. Leave speed out.")
        self.fps, self.speed = fps, speed
        self.dropped = 0
        """Frames that nobody looked at in time."""
        self.reconnects = 0
        """How often a network stream was lost and found again."""
        self._line: deque[LiveFrame] = deque(maxlen=waiting)
        self._changed = Condition()
        self._ended = False
        self._error: str | None = None
        self._wanted = True
        self._thread = Thread(target=self._work, name="llava-mini stream", daemon=True)

    def __enter__(self) -> Self:
        if self._thread.ident is not None:
            raise ValueError(f"The stream {self.source!r} was read before. Open it anew.")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
        self._thread.join(_LEAVE_SECONDS)  # a camera that says nothing is left to itself

    def take(self) -> list[LiveFrame]:
        """Wait for a frame and return all that are in line; an empty list when the stream has ended.

        Raises:
            ValueError: If the stream cannot be opened or was lost, or its context was not entered.
        """
        if self._thread.ident is None:
            raise ValueError(f"The stream {self.source!r} is read within a with statement only.")
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._ended)
            frames = list(self._line)
            self._line.clear()
            if not frames and self._error is not None:
                raise ValueError(self._error)
            return frames

    def _work(self) -> None:
        try:
            if self.is_file:
                with open_film(Path(self.source).expanduser()) as container:
                    self._play(container)
            else:
                self._follow()
        except (ValueError, *film_errors()) as error:
            text = str(error) if isinstance(error, ValueError) else f"{self.source!r} cannot be read ({reason(error)})."
            self._end(text)
        except BaseException as error:
            self._end(f"Reading {self.source!r} failed ({type(error).__name__}: {error}).")
            raise
        else:
            self._end(None)

    def _end(self, error: str | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def _play(self, container: "InputContainer") -> None:
        """Hand on the frames of a file when their time has come."""
        began = time.monotonic()
        for frame, at in self._due(container, lambda frame: frame.time):
            self._sleep(began + at / self.speed - time.monotonic())
            self._hand_on(frame, at)

    def _follow(self) -> None:
        """Hand on what is live, and find a lost network stream again."""
        began, lost_at, connected = time.monotonic(), 0.0, False
        while self._wanted:
            try:
                with _open_live(self.source) as container:
                    if connected:
                        self.reconnects += 1
                    for frame, at in self._due(container, lambda _: time.monotonic() - began):
                        connected, lost_at = True, 0.0
                        self._hand_on(frame, at)
                if connected and self.source.startswith(("http://", "https://")):
                    return  # a file, or a broadcast that is over
                problem = "the stream ended"
            except film_errors() as error:
                problem = reason(error)
            if not self._wanted:
                return
            if not connected or _camera(self.source):
                raise ValueError(
                    f"The stream {self.source!r} gives no picture ({problem}). Check the address with its name and "
                    "password, and that the camera is on and not used by another program."
                )
            now = time.monotonic()
            lost_at = lost_at or now
            if now - lost_at > _RECONNECT_SECONDS:
                raise ValueError(f"The stream {self.source!r} was lost ({problem}) and did not come back.")
            self._sleep(1.0)

    def _due(
        self, container: "InputContainer", clock: Callable[["VideoFrame"], float | None]
    ) -> Iterator[tuple["VideoFrame", float]]:
        """Decode everything, and give a frame whenever one is due, with its time."""
        stream = picture_stream(container, Path(self.source))
        stream.thread_type = "AUTO" if self.is_file else "SLICE"  # threads for whole frames would hold some back
        first: float | None = None
        due = 0.0
        for frame in container.decode(stream):
            if not self._wanted:
                return
            now = clock(frame)
            if now is None:  # without a time stamp
                continue
            first = first if first is not None else now if self.is_file else 0.0
            at = now - first
            if at + 1e-6 >= due:
                step = 1 / self.fps
                due = due + step if due + step > at else at + step
                yield frame, at

    def _hand_on(self, frame: "VideoFrame", at: float) -> None:
        check_pixels(frame.width, frame.height, f"A frame of {self.source!r}", MAX_PIXELS)
        live = LiveFrame(image=upright(frame), time=at)
        with self._changed:
            self.dropped += len(self._line) == self._line.maxlen
            self._line.append(live)
            self._changed.notify_all()

    def _sleep(self, seconds: float) -> None:
        """Wait, but not after the end of the context."""
        if seconds > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._wanted, timeout=seconds)


def _camera(source: str) -> str | None:
    """The camera's number or device if the source is one."""
    found = re.fullmatch(r"camera:(\d+)|(/dev/video\d+)", source)
    return None if found is None else found[1] or found[2]


def _open_live(source: str) -> "InputContainer":
    """Open a camera or a network stream.

    Raises:
        ValueError: If cameras cannot be opened by number on this system.
    """
    import av

    camera = _camera(source)
    if camera is None:
        options = {"rtsp_transport": "tcp"} if source.startswith(("rtsp://", "rtsps://")) else {}
        return av.open(source, options=options, timeout=(_OPEN_SECONDS, _SILENCE_SECONDS))
    if sys.platform == "darwin":
        return av.open(camera, format="avfoundation", options={"framerate": "30"})
    if not sys.platform.startswith("linux"):
        raise ValueError(f"The camera {source!r} cannot be opened by number here. Give a network stream.")
    return av.open(camera if camera.startswith("/") else f"/dev/video{camera}", format="v4l2")
