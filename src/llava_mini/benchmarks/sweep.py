"""All benchmarks at full size on one machine, in slices: what ``make bench-gpu`` runs.

Each job runs in a process of its own, so that its memory limit and what it leaves on the device are its own, and
writes one file. A file that is there is not made again, so the same command goes on where a slice ended.
"""

import importlib.util
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mini.benchmarks.processes import ProcessError, fresh
from llava_mini.benchmarks.report import tupled
from llava_mini.benchmarks.run import run_benchmark
from llava_mini.training.checkpoints import write_text

SIZES = ("7b", "8b")
LIMITS: tuple[float | None, ...] = (None, 24.0)
"""GiB of the GPU that may be used: all, and as much as a common card has."""
LEAST_SECONDS = 20.0
"""No job begins when less of a slice is left."""
WHOLE_SLICE = 0.9
"""A job that is cut off after so much of a slice would not be done in another one either."""
_CHILD = "from llava_mini.benchmarks.sweep import run_job; run_job(*sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark with its settings."""

    bench: str
    given: Mapping[str, Any]
    needs: str = ""
    """A module without which it is left out."""


@dataclass(kw_only=True)
class Swept:
    """What became of the jobs, by their names."""

    done: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Which module is missing."""
    failed: dict[str, str] = field(default_factory=dict)
    """The last line that was told; all of it is in the file beside the results, ``NAME.log``."""
    left: list[str] = field(default_factory=list)
    """Not run so far, for want of time."""

    @property
    def code(self) -> int:
        """For the shell: 0 when all is done, 3 when there is more to do, 1 when all that is left has failed."""
        return 3 if self.left else 1 if self.failed else 0


def jobs(sizes: Sequence[str] = SIZES, device: str = "cuda") -> dict[str, Job]:
    """Jobs by name, in the order in which they run; on a CPU fewer and smaller ones."""
    on_gpu = device.startswith("cuda")
    limits, frames = (LIMITS, [1, 16, 64, 256]) if on_gpu else ((None,), [1, 4])
    found = {f"flops-{size}": Job(bench="flops", given={"size": size, "tokens": [1, 4, 16, 64]}) for size in sizes}
    for limit in limits:
        for size in sizes:
            where = {"size": size, "device": device, "memory_limit": limit}
            name = f"{size}{'' if limit is None else f'-{limit:g}gib'}"
            found[f"latency-{name}"] = Job(
                bench="latency", given={**where, "tokens": [1, 4, 16, 64], "repeats": 20, "compiled": on_gpu}
            )
            found[f"latency-hd-{name}"] = Job(
                bench="latency", given={**where, "tokens": [64], "hd": True, "repeats": 20}
            )
            found[f"video-{name}"] = Job(bench="video", given={**where, "frames": frames, "released_frames": 64})
            if limit is not None:
                hours = {"frames": [10_000], "released_frames": 0, "most_tokens": 0, "kept_on_host": on_gpu}
                found[f"video-hours-{name}"] = Job(bench="video", given={**where, **hours, "repeats": 1, "warmup": 0})
            else:
                step = {"stages": [2], "low_rank": 64, "update": True, "samples": 8 if on_gpu else 1}
                found[f"train-{name}"] = Job(bench="train", given={**where, **step}, needs="peft")
            found[f"memory-{name}"] = Job(bench="memory", given={**where, "tokens": [1, 4], "frames": frames})
    if on_gpu:
        found["train-middle"] = Job(bench="train", given={"size": "middle", "device": device, "update": True})
    found["load"] = Job(bench="load", given={"device": device})
    found["decode"] = Job(bench="decode", given={}, needs="av")
    return found


def sweep(folder: Path | str, wanted: Mapping[str, Job], *, minutes: float) -> Swept:
    """Run the jobs whose files are not there, until all are or the time is over.

    Args:
        folder: for the files; made if it is missing.
        wanted: jobs by name.
        minutes: the time. A job that is running when it ends is stopped and begins anew in a later slice, after the
            others, so that one that is slow does not keep them waiting for ever.

    Raises:
        ValueError: the time is not above 0.
    """
    if minutes <= 0:
        raise ValueError(f"A slice lasts some minutes, got {minutes:g}.")
    folder, end = Path(folder), time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    swept = Swept()
    for name in sorted(wanted, key=lambda name: (folder / f"{name}.log").exists()):
        job, path, seconds = wanted[name], folder / f"{name}.json", end - time.monotonic()
        if path.exists():
            swept.done.append(name)
        elif job.needs and importlib.util.find_spec(job.needs) is None:
            swept.left_out[name] = job.needs
        elif seconds < LEAST_SECONDS:
            swept.left.append(name)
        else:
            print(f"== {name}", flush=True)
            _run(name, job, path, seconds, swept, has_whole_slice=seconds > WHOLE_SLICE * 60 * minutes)
    _tell(swept)
    return swept


def run_job(path: str, job: str) -> None:
    """Run one job and write its file. For a process of its own.

    Args:
        path: the file.
        job: ``bench`` and ``given`` of a ``Job``, as JSON.
    """
    fields = json.loads(job)
    report = run_benchmark(fields["bench"], tupled(fields["given"]))
    print(report)
    report.write(Path(path))


def _run(name: str, job: Job, path: Path, seconds: float, swept: Swept, *, has_whole_slice: bool) -> None:
    log = path.with_suffix(".log")
    try:
        printed, _ = fresh(_CHILD, str(path), json.dumps({"bench": job.bench, "given": job.given}), timeout=seconds)
    except subprocess.TimeoutExpired:
        write_text(log, f"cut off after {seconds:.0f} seconds\n")
        if has_whole_slice:
            swept.failed[name] = f"not done after a slice of {seconds / 60:.3g} minutes; give it more (SLICE_MINUTES)"
        else:
            swept.left.append(name)
    except ProcessError as error:
        write_text(log, error.told)
        swept.failed[name] = str(error)
    else:
        log.unlink(missing_ok=True)
        print(printed, flush=True)
        swept.done.append(name)


def _tell(swept: Swept) -> None:
    print(f"{len(swept.done)} done")
    for name, module in swept.left_out.items():
        print(f"{name}: left out, for {module} is not installed")
    for name, reason in swept.failed.items():
        print(f"{name}: {reason}")
    if swept.left:
        print(f"more to do, with the same command: {', '.join(swept.left)}")
