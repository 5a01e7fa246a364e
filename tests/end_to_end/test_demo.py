"""What ``make demo`` shows is right."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEWEST_RIGHT = 9
"""Of the ten questions about the two files. The gallery counts in no test: it shows what came out, whatever that is."""


def test_answers_of_the_demo_are_right_more_often_than_by_chance():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = dict(re.findall(r"^(examples/\S+)\n((?: .*\n)+)", done.stdout, re.MULTILINE))
    verdicts = {
        name: re.findall(r"\((right|wrong, should be: .*)\)$", lines, re.MULTILINE) for name, lines in files.items()
    }
    asked = [*verdicts.pop("examples/media/picture.png"), *verdicts.pop("examples/media/clip.mp4")]
    assert len(asked) == 10
    assert asked.count("right") >= FEWEST_RIGHT, done.stdout
    assert len(verdicts) == 11, "The gallery holds 8 images and 3 clips."
    assert all(verdicts.values())
    total = len(asked) + sum(len(found) for found in verdicts.values())
    right = asked.count("right") + sum(found.count("right") for found in verdicts.values())
    assert f"\n{right} of {total} right" in done.stdout
