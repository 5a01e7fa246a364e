"""The driver of make bench-gpu: nothing twice, nothing lost, and a word about everything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llava_mini
from llava_mini.benchmarks import sweep as module
from llava_mini.benchmarks.processes import ProcessError
from llava_mini.benchmarks.run import run_benchmark
from llava_mini.benchmarks.sweep import Job, jobs, run_job, sweep

ROOT = Path(llava_mini.__file__).parents[2]
COUNT = {"size": "tiny", "tokens": [1, 4]}
WANTED = {"one": Job(bench="flops", given=COUNT), "two": Job(bench="flops", given=COUNT)}


@pytest.fixture
def started(monkeypatch):
    """Jobs run in this process; names of the files that they wrote."""
    names = []

    def fresh(program, path, job, timeout):
        names.append(Path(path).name)
        run_job(path, job)
        return "tables", timeout

    monkeypatch.setattr(module, "fresh", fresh)
    return names


def test_a_second_run_makes_only_what_is_missing(tmp_path, started):
    assert sweep(tmp_path, WANTED, minutes=1).code == 0
    (tmp_path / "two.json").unlink()
    again = sweep(tmp_path, WANTED, minutes=1)
    assert started == ["one.json", "two.json", "two.json"]
    assert (again.done, again.code) == (["one", "two"], 0)
    assert json.loads((tmp_path / "one.json").read_text())["settings"]["tokens"] == [1, 4]


def test_what_there_is_no_time_for_is_left_for_the_next_slice(tmp_path, started, capsys):
    swept = sweep(tmp_path, WANTED, minutes=module.LEAST_SECONDS / 120)
    assert (swept.left, swept.code, started) == (["one", "two"], 3, [])
    assert "more to do, with the same command: one, two" in capsys.readouterr().out


@pytest.fixture
def slow(started, monkeypatch):
    """Job "slow" takes longer than it is given; the clock that goes on by that is in ``slow[0]``."""
    now, run = [0.0], module.fresh

    def fresh(program, path, job, timeout):
        if Path(path).stem == "slow":
            started.append("slow.json")
            now[0] += timeout
            raise subprocess.TimeoutExpired("python", timeout)
        now[0] += 20
        return run(program, path, job, timeout)

    monkeypatch.setattr(module, "fresh", fresh)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_job_that_is_stopped_is_left_and_the_next_one_too(tmp_path, slow):
    wanted = {"one": WANTED["one"], "slow": WANTED["one"], "two": WANTED["two"]}
    swept = sweep(tmp_path, wanted, minutes=1)
    assert (swept.done, swept.left, swept.code) == (["one"], ["slow", "two"], 3)
    assert (tmp_path / "slow.log").read_text() == "cut off after 40 seconds\n"


def test_a_slow_job_waits_for_the_others_and_fails_when_a_whole_slice_is_not_enough(tmp_path, slow, started):
    wanted = {"one": WANTED["one"], "slow": WANTED["one"], "two": WANTED["two"]}
    codes = [sweep(tmp_path, wanted, minutes=1).code for _ in range(2)]
    last = sweep(tmp_path, wanted, minutes=1)
    assert started == ["one.json", "slow.json", "two.json", "slow.json", "slow.json"]
    assert codes == [3, 3]
    assert (last.done, last.code) == (["one", "two"], 1)
    assert "not done after a slice of 1 minutes" in last.failed["slow"]


def test_a_job_that_fails_leaves_a_log_and_the_others_run(tmp_path, started, monkeypatch, capsys):
    run = module.fresh

    def fails_first(program, path, job, timeout):
        if Path(path).stem == "one":
            raise ProcessError(1, "Traceback\nKeyError: 'x'\n")
        return run(program, path, job, timeout)

    monkeypatch.setattr(module, "fresh", fails_first)
    swept = sweep(tmp_path, WANTED, minutes=1)
    assert (swept.done, swept.code) == (["two"], 1)
    assert (tmp_path / "one.log").read_text().startswith("Traceback")
    assert "KeyError: 'x'" in capsys.readouterr().out
    monkeypatch.setattr(module, "fresh", run)
    assert sweep(tmp_path, WANTED, minutes=1).code == 0
    assert not (tmp_path / "one.log").exists()


def test_what_needs_a_missing_module_is_left_out_and_told(tmp_path, started, capsys):
    swept = sweep(tmp_path, {"film": Job(bench="decode", given={}, needs="no_such_module")}, minutes=1)
    assert (swept.left_out, swept.code) == ({"film": "no_such_module"}, 0)
    assert "film: left out, for no_such_module is not installed" in capsys.readouterr().out


def test_a_slice_without_minutes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="some minutes, got 0"):
        sweep(tmp_path, WANTED, minutes=0)


def test_jobs_run_everything_at_both_sizes_with_and_without_a_limit():
    found = jobs()
    assert len(found) == 2 + 2 * 2 * 5 + 1 + 2  # hours of film where memory is scarce, training where it is not
    for size in ("7b", "8b"):
        assert found[f"latency-{size}"].given["memory_limit"] is None
        assert found[f"memory-{size}-24gib"].given["memory_limit"] == 24
    assert {job.bench for job in found.values()} == {"flops", "latency", "video", "memory", "train", "load", "decode"}
    assert not any(job.given.get("memory_limit") for job in jobs(device="cpu").values())


@pytest.mark.parametrize("name", jobs(["tiny"], device="cpu"))
def test_the_settings_of_every_job_are_those_of_its_benchmark(name, monkeypatch):
    job = jobs(["tiny"], device="cpu")[name]
    given = {key: tuple(one) if isinstance(one, list) else one for key, one in job.given.items()}
    bench = __import__(f"llava_mini.benchmarks.{job.bench}", fromlist=["run"])
    monkeypatch.setattr(bench, "run", lambda settings: settings)
    assert all(getattr(run_benchmark(job.bench, given), key) == one for key, one in given.items())


def test_make_bench_gpu_needs_no_venv_and_tells_whether_there_is_more_to_do(tmp_path):
    stub = tmp_path / "python.py"  # runs the program of the Makefile with a driver that does nothing
    stub.write_text(
        "import sys, types\n"
        "driver = types.ModuleType('sweep')\n"
        "driver.jobs = lambda sizes, device: (sizes, device)\n"
        "driver.sweep = lambda folder, wanted, minutes: print(folder, wanted) or types.SimpleNamespace(code=3)\n"
        "sys.modules |= {name: driver for name in ('llava_mini', 'llava_mini.benchmarks')}\n"
        "sys.modules['llava_mini.benchmarks.sweep'] = driver\n"
        "exec(sys.argv[2])\n"
    )
    make = ["make", "bench-gpu", f"PYTHON={sys.executable} {stub}", "OUT=here"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert "here (['7b', '8b'], 'cuda')" in done.stdout.splitlines()
    assert "Error 3" in done.stderr
