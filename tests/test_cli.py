"""The console script: light until a command runs, and well-behaved as a process."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llava_mini
import llava_mini_cli
from tests.tiny_engine import picture, save_tiny, write_film

COMMANDS = ("ask", "chat", "watch", "convert", "export", "data", "train", "evaluate", "analyze", "info", "bench")
SOURCE = Path(llava_mini_cli.__file__).parent
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A model that never ends its answer, and a picture."""
    folder = tmp_path_factory.mktemp("talkative")
    picture().save(folder / "picture.png")
    return save_tiny(folder / "model", max_position_embeddings=1_000_000), folder / "picture.png"


def start(*arguments, **streams):
    """The script in a process of its own, which hears Ctrl-C even where these tests run in the background."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "llava_mini_cli", *map(str, arguments)],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys, llava_mini_cli\n"
        "try: llava_mini_cli.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'PIL', 'llava_mini'} & set(sys.modules)\n"
        "sys.exit(code or ' '.join(heavy) or 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    told = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"], env=environment, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (0, "")
    assert "usage: llava-mini" in told.stdout
    assert all(command in told.stdout for command in (arguments or COMMANDS))


def test_the_version_is_the_packages(capsys):
    assert llava_mini_cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llava-mini {llava_mini.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["ask"],
        ["ask", "what?", "a.png", "--frames", "2", "--fps", "1"],
        ["ask", "what?", "a.png", "--frames", "many"],
        ["ask", "what?", "a.png", "--quantization", "int3"],
        ["train", "large"],
        ["bench", "speed"],
    ],
)
def test_wrong_flags_end_with_2_and_a_message(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        llava_mini_cli.main(arguments)
    told = capsys.readouterr()
    assert end.value.code == 2
    assert told.out == ""
    assert told.err


@pytest.mark.parametrize(("scores", "code"), [("{'all': 0.9}", 0), ("{}", 3)])
def test_make_train_gpu_needs_no_venv_and_tells_whether_there_is_more_to_do(tmp_path, scores, code):
    stub = tmp_path / "python.py"  # runs the program of the Makefile with a recipe and hardware that do nothing
    stub.write_text(
        "import sys, types\n"
        "tiny, devices = types.ModuleType('tiny'), types.ModuleType('devices')\n"
        f"tiny.train_tiny = lambda folder, slice_minutes, hardware: print(folder, hardware) or {scores}\n"
        "devices.choose_hardware = lambda device: device\n"
        "sys.modules |= {'llava_mini.recipes.tiny': tiny, 'llava_mini.training.devices': devices}\n"
        "sys.modules |= {name: tiny for name in ('llava_mini', 'llava_mini.recipes', 'llava_mini.training')}\n"
        "exec(sys.argv[2])\n"
    )
    make = ["make", "train-gpu", f"PYTHON={sys.executable} {stub}", "OUT=here"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert "here cuda" in done.stdout.splitlines()
    assert done.returncode == (2 if code else 0)  # make has no other code for a command that fails
    assert ("Error 3" in done.stderr) == (code == 3)


def test_ctrl_c_ends_with_130_and_no_traceback(talkative):
    model, image = talkative
    process = start(
        *("ask", "what?", image, "--model", model, "--max-tokens", 900_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert (process.returncode, told) == (130, b"")


def test_ctrl_c_in_a_film_leaves_whole_files_in_the_cache_and_nothing_else(talkative, tmp_path):
    film, cache = write_film(tmp_path / "film.mp4", seconds=600), tmp_path / "cache"
    process = start(
        *("ask", "what?", film, "--model", talkative[0], "--all-frames", "--cache", cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while len(list(cache.rglob("*.seen.safetensors"))) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert (process.returncode, told) == (130, b"")
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert 20 <= len(files) < 2400
    assert not [path.name for path in files if not re.fullmatch(r"[0-9a-f]{40}\.seen\.safetensors", path.name)]
    assert all(load_file(path) for path in files)


def test_a_reader_that_leaves_ends_the_answer_quietly(talkative):
    model, image = talkative
    process = start(
        *("ask", "what?", image, "--model", model, "--max-tokens", 900_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1)
    process.stdout.close()
    told = process.stderr.read()
    assert (process.wait(), told) == (0, b"")


def test_ctrl_c_stops_an_answer_in_a_chat_and_ctrl_d_ends_it(talkative):
    model, image = talkative
    terminal, side = pty.openpty()
    process = start(
        *("chat", image, "--model", model, "--max-tokens", 900_000),
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
    )
    os.close(side)

    seen = b""

    def wait_for(text, after=0):
        """Read until the text has come, and so many bytes after it."""
        nonlocal seen
        while len(seen.partition(text)[2]) < after or text not in seen:
            assert select.select([terminal], [], [], 120)[0], f"{text!r} did not come after {seen!r}"
            seen += os.read(terminal, 4096)
        seen = seen.partition(text)[2]

    wait_for(b"/help lists what else can be typed")
    wait_for(b"> ")
    os.write(terminal, b"what?\n")
    wait_for(b"what?\r\n", after=200)
    process.send_signal(signal.SIGINT)
    wait_for(b"(stopped;")
    wait_for(b"> ")
    os.write(terminal, b"/help\n")
    wait_for(b"Ctrl-C stops an answer")
    wait_for(b"> ")
    time.sleep(0.5)  # a signal that comes just before readline begins to wait is seen with the next key only
    process.send_signal(signal.SIGINT)
    wait_for(b"(stopped;")
    wait_for(b"> ")
    os.write(terminal, b"\x04")
    assert process.wait() == 0
    os.close(terminal)
