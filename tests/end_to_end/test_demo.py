"""What ``make demo`` shows is right."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRUTH = {
    "What color is the star?": "blue",
    "What shape is the yellow thing?": "triangle",
    "How many things are there?": "3",
    "Where is the red circle?": "top left",
    "Is the red circle left or right of the blue star?": "left",
    "Which is larger, the blue star or the yellow triangle?": "the yellow triangle",
    "What word is written?": "stop",
    "What moves?": "the purple heart",
    "Which way does the purple heart move?": "right",
    "What color is the square?": "green",
}
"""Questions of the demo whose answer is one of a few."""


def test_answers_of_the_demo_are_right_more_often_than_by_chance():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = dict(re.findall(r"^\$ llava-mini ask '(.*)' .*\n(.*)$", done.stdout, re.MULTILINE))
    assert set(TRUTH) == set(answers)
    right = [question for question, truth in TRUTH.items() if answers[question] == truth]
    assert len(right) >= 7, answers
