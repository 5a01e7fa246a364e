"""Ask the embedded model about a picture file and a video file, as on the command line.

Run:  make demo
"""

import shlex
import time
from pathlib import Path

from llava_mini_cli import main as llava_mini

MEDIA = Path(__file__).parent / "media"
QUESTIONS = {
    "picture.png": (
        "What color is the star?",
        "What shape is the yellow thing?",
        "How many things are there?",
        "Where is the red circle?",
        "Is the red circle left or right of the blue star?",
        "Which is larger, the blue star or the yellow triangle?",
        "What word is written?",
    ),
    "clip.mp4": (
        "What moves?",
        "Which way does the purple heart move?",
        "What color is the square?",
    ),
}


def main() -> int:
    start = time.perf_counter()
    for name, questions in QUESTIONS.items():
        file = MEDIA / name
        for question in questions:
            print("$", shlex.join(["llava-mini", "ask", question, f"examples/media/{name}"]), flush=True)
            if exit_code := llava_mini(["ask", question, str(file)]):
                return exit_code
        print()
    print(f"{time.perf_counter() - start:.1f} seconds in all. To talk on: llava-mini chat FILE")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
