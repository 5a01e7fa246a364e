"""The drawn world as ordinary files in the format of LLaVA: PNG, MP4 and JSON that any other program can train on.

A folder holds ``SPLIT.json`` (the list of conversations), ``images/``, ``videos/``, ``facts.jsonl`` (for each record
what its questions are about, so that scores by kind can be computed) and ``about.json``. Everything follows from
the settings: the same ones give the same files, whatever the number of processes. A file appears under its name when
it is complete, so a command that was cut off goes on where it was; the JSON files come last.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
import PIL
from av.codec import Codec
from av.video.stream import VideoStream
from PIL import Image
from tqdm import tqdm

from llava_mini.data.synthetic.splits import Split
from llava_mini.data.synthetic.world import WorldItem, WorldSettings, world_item

FRAME_RATE = 8
"""Frames per second of a film. Each frame of a clip is shown for one second."""
MAX_QUESTIONS = 20
"""Most questions about one picture."""
ENCODERS = {
    "libx264": {"preset": "veryfast", "crf": "8", "x264-params": "mbtree=0:weightp=0"},
    "libopenh264": {"rc_mode": "off"},
    "mpeg4": {"qmin": "1", "qmax": "2"},
}
"""Encoders of films with their options, the best first: two of H.264, and one that is always there.

With its trees of macroblocks or weighted prediction, libx264 now and then gives other bytes for the same frames.
"""

_Media = Literal["image", "video"]
_Job = tuple[_Media, int]
_FOLDERS: dict[_Media, tuple[str, str]] = {"image": ("images", "png"), "video": ("videos", "mp4")}
_JOBS_TOGETHER = 32
_WORTH_A_POOL = 5000
"""Fewest records for which starting further processes saves time."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Which records of the world are written."""

    split: Split = "train"
    images: int = 1000
    """How many records about an image."""
    clips: int = 100
    """How many records about a video."""
    first: int = 0
    """Index of the first record of each sort: what a seed is elsewhere. Ranges that do not overlap share no record."""
    questions: int = 3
    """Most questions about a picture; those that it does not allow are left out."""

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"Unknown split {self.split!r}. The splits are {', '.join(get_args(Split))}.")
        for name in ("images", "clips", "first"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.images + self.clips == 0:
            raise ValueError("Neither images nor clips were asked for. Give at least one of them a number above 0.")
        if not 1 <= self.questions <= MAX_QUESTIONS:
            raise ValueError(f"questions is {self.questions}; a picture can have 1 to {MAX_QUESTIONS}.")

    @property
    def command(self) -> str:
        """What makes these records, on the command line."""
        flags = " ".join(f"--{name} {value}" for name, value in asdict(self).items())
        return f"llava-mini data synth DIR {flags}"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export did."""

    folder: Path
    num_questions: int
    drawn: dict[str, int]
    """Images and videos that were not there before."""
    seconds: float
    """Time it took, the start of further processes and the reading of what was there included."""
    draw_milliseconds: float
    """Mean time of a processor for making up one image and its questions and drawing it, without its PNG file."""
    processes: int


def export_world(folder: Path, settings: ExportSettings, *, processes: int | None = None) -> Exported:
    """Write records of the world into a folder, or go on with a folder that is not complete.

    Args:
        folder: Is made if it is missing.
        settings: Which records.
        processes: How many draw at a time. None: one per core, or one alone for few records. The files do not depend
            on it.

    Raises:
        ValueError: The folder holds something else, or records with other settings or of another version.
        OSError: A file cannot be written, or a process was ended from outside; what is written stays.
    """
    total = settings.images + settings.clips
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = processes if total >= _WORTH_A_POOL else 1
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be 1 or more.")
    start = time.perf_counter()
    _claim(folder, settings)
    for directory in {_FOLDERS[media][0] for media, _ in _jobs(settings)}:
        (folder / directory).mkdir(exist_ok=True)
    kinds: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    seconds_of_images = 0.0
    records, facts = folder / f"{settings.split}.json", folder / "facts.jsonl"
    with (
        _part_of(records).open("w", encoding="utf-8") as record_file,
        _part_of(facts).open("w", encoding="utf-8") as fact_file,
        tqdm(total=total, desc="drawing", unit=" records", disable=None) as bar,
        closing(_write_records(folder, settings, processes=processes)) as all_written,
    ):
        before = "[\n"
        for written in all_written:
            record_file.write(before + json.dumps(written.record, ensure_ascii=False))
            fact_file.write(json.dumps(written.facts, ensure_ascii=False) + "\n")
            before = ",\n"
            kinds.update(turn["kind"] for turn in written.facts["turns"])
            if written.seconds is not None:
                drawn[written.media] += 1
                seconds_of_images += written.seconds if written.media == "image" else 0.0
            bar.update()
        record_file.write("\n]\n")
    _part_of(records).replace(records)
    _part_of(facts).replace(facts)
    counts = {"images": settings.images, "clips": settings.clips, "questions": dict(sorted(kinds.items()))}
    _write(folder / "about.json", _json_bytes({**_about(settings), "counts": counts}))
    return Exported(
        folder=folder,
        num_questions=sum(kinds.values()),
        drawn=dict(drawn),
        seconds=time.perf_counter() - start,
        draw_milliseconds=1000 * seconds_of_images / max(drawn["image"], 1),
        processes=processes,
    )


def write_film(path: Path, frames: Iterable[Image.Image]) -> None:
    """Write a film that shows each frame for one second, so that one frame per second gives them back.

    Args:
        path: A file whose name ends with ``.mp4``.
        frames: Pictures of one size, with even sides.
    """
    name = encoder()
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream(name, rate=FRAME_RATE, options=ENCODERS[name])
        assert isinstance(stream, VideoStream)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # more would change the bytes with the machine
        stream.codec_context.gop_size = FRAME_RATE  # each frame of the clip begins with a key frame
        for number, picture in enumerate(frames):
            if number == 0:
                stream.width, stream.height = picture.size
            frame = av.VideoFrame.from_image(picture)
            for repeat in range(FRAME_RATE):
                frame.pts = number * FRAME_RATE + repeat
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


@lru_cache
def encoder() -> str:
    """Return the best of ``ENCODERS`` that PyAV has here."""
    for name in ENCODERS:
        try:
            Codec(name, "w")
        except ValueError:
            continue
        return name
    raise ValueError(f"PyAV has none of the encoders {', '.join(ENCODERS)}. Install a wheel of av from PyPI.")


@dataclass(frozen=True, kw_only=True)
class _Written:
    """One record that is on the disk."""

    media: _Media
    record: dict[str, Any]
    facts: dict[str, Any]
    seconds: float | None
    """Time of a processor for making it up and drawing it. None: the file was there."""


def _jobs(settings: ExportSettings) -> list[_Job]:
    indices = range(settings.first, settings.first + max(settings.images, settings.clips))
    images: list[_Job] = [("image", index) for index in indices[: settings.images]]
    return images + [("video", index) for index in indices[: settings.clips]]


def _write_record(folder: Path, settings: ExportSettings, media: _Media, index: int) -> _Written:
    world = WorldSettings(
        min_turns=settings.questions, max_turns=settings.questions, clip_share=float(media == "video")
    )
    start = time.process_time()
    item = world_item(settings.split, index, world)
    directory, suffix = _FOLDERS[media]
    name = f"{directory}/{index:06d}.{suffix}"
    seconds = None
    path = folder / name
    if not path.exists() or path.stat().st_size == 0:  # a machine that loses power can leave an empty file
        record = item.record()
        seconds = time.process_time() - start
        if record.image is None:
            write_film(_part_of(path), record.video)
        else:
            record.image.save(_part_of(path), format="PNG", compress_level=3)  # hardly larger than 6, much faster
        _part_of(path).replace(path)
    identity = f"{settings.split}-{media}-{index:06d}"
    return _Written(
        media=media, record=_record(identity, media, name, item), facts=_facts(identity, name, item), seconds=seconds
    )


def _record(identity: str, media: _Media, name: str, item: WorldItem) -> dict[str, Any]:
    """Return a record as LLaVA writes it: the mark of the image or video stands before the first question."""
    conversations = []
    mark = f"<{media}>\n"
    for turn in item.turns:
        conversations.append({"from": "human", "value": mark + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
        mark = ""
    return {"id": identity, media: name, "conversations": conversations}


def _facts(identity: str, name: str, item: WorldItem) -> dict[str, Any]:
    return {
        "id": identity,
        "file": name,
        "frames": len(item.frames),
        "description": item.description,
        "turns": [
            {
                "question": turn.question,
                "answer": turn.answer,
                "kind": turn.kind,
                "form": turn.form,
                "case": turn.case,
                "held_out": turn.held_out,
                "choices": turn.choices,
            }
            for turn in item.turns
        ],
    }


def _about(settings: ExportSettings) -> dict[str, Any]:
    """Return what a folder says of itself: its settings, and all else that its files depend on."""
    return {
        "what": "Drawn scenes and clips with questions whose answers are known. Made by llava-mini.",
        "command": settings.command,
        "files": {
            f"{settings.split}.json": "conversations in the format of LLaVA; paths are relative to this folder",
            "facts.jsonl": "for each record, in the same order: what is to be seen, and the kind and form of each "
            "question; choices are the answers that a question names; held_out: no training question is phrased so",
            "images": "PNG, one for each record about an image",
            "videos": f"MP4, {FRAME_RATE} frames per second; each frame of the clip is shown for one second",
        },
        "settings": asdict(settings),
        "versions": {
            "llava-mini": _version(),
            "world": _fingerprint(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "av": av.__version__,
            "encoder": encoder(),
        },
    }


def _version() -> str:
    try:
        return importlib.metadata.version("llava-mini")
    except importlib.metadata.PackageNotFoundError:
        return "from its source folder"


@lru_cache
def _fingerprint() -> str:
    """Return a short digest of the code that draws: pictures of one code and answers of another must never meet."""
    files = sorted(
        (entry for entry in resources.files("llava_mini.data.synthetic").iterdir() if entry.name.endswith(".py")),
        key=lambda entry: entry.name,
    )
    assert files
    return hashlib.sha256(b"".join(entry.read_bytes() for entry in files)).hexdigest()[:12]


def _claim(folder: Path, settings: ExportSettings) -> None:
    """Make the folder and say in ``about.json`` what it is for, or see that it says so already."""
    about = folder / "about.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file. Give the name of a folder.")
    if not about.exists():
        if folder.exists() and any(path != _part_of(about) for path in folder.iterdir()):
            raise ValueError(
                f"{str(folder)!r} is not empty, and its files were not made by this command. Give a new folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The folder {str(folder)!r} cannot be made ({error.strerror}). Give one where files can be written."
            ) from error
        _write(about, _json_bytes(_about(settings)))
        return
    try:
        found = json.loads(about.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or "settings" not in found or "versions" not in found:
        raise ValueError(f"{str(about)!r} was not written by this command. Give a new folder.")
    wanted = _about(settings)
    for part in ("settings", "versions"):
        for name, value in wanted[part].items():
            there = found[part].get(name) if isinstance(found[part], dict) else None
            if there != value:
                raise ValueError(
                    f"{str(folder)!r} was made with {name} {there}, not {value}. Give a new folder, or repeat the "
                    "command in its about.json."
                )


def _write_records(folder: Path, settings: ExportSettings, *, processes: int) -> Generator[_Written, None, None]:
    """Write the files of all records that are not there yet, and yield all records in order."""
    if processes == 1:
        for media, index in _jobs(settings):
            yield _write_record(folder, settings, media, index)
        return
    # Not multiprocessing: a fork of a process that has loaded torch can hang, and what it spawns outlives its parent's
    # death. These processes end when nobody reads what they print.
    start = f"import sys, json, logging; sys.path[:] = json.loads(sys.argv[1]); logging.disable(); from {__name__} "
    shared = (json.dumps(sys.path), str(folder), json.dumps(asdict(settings)), str(processes))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", start + "import work; work(*sys.argv[2:])", *shared, str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process
        )
        for number in range(processes)
    ]
    try:
        for number in range(len(_jobs(settings))):
            worker = workers[number // _JOBS_TOGETHER % processes]
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line.endswith(b"\n"):
                raise OSError(
                    f"A process that draws has ended with code {worker.wait()}; is memory short, or was it ended from "
                    "outside? Start the command again, it goes on."
                )
            told = json.loads(line)
            if "error" in told:
                raise OSError(told["error"])
            yield _Written(**told)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.communicate()


def work(folder: str, settings: str, processes: str, number: str) -> None:
    """Write the share of one of several processes; print each record as a line of JSON.

    Args:
        folder: As in ``export_world``.
        settings: ``ExportSettings`` as JSON.
        processes: How many processes there are.
        number: Which of them this is, from 0.
    """
    choice = ExportSettings(**json.loads(settings))
    jobs = [job for place, job in enumerate(_jobs(choice)) if place // _JOBS_TOGETHER % int(processes) == int(number)]
    try:
        for media, index in jobs:
            print(json.dumps(asdict(_write_record(Path(folder), choice, media, index))), flush=True)
    except BrokenPipeError:
        os._exit(1)  # without the attempt to flush what nobody will read
    except OSError as error:
        print(json.dumps({"error": str(error)}), flush=True)


def _part_of(path: Path) -> Path:
    """Return the name of a file while it is written."""
    return path.with_name(path.name + ".part")


def _write(path: Path, content: bytes) -> None:
    _part_of(path).write_bytes(content)
    _part_of(path).replace(path)


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
