"""Ask the embedded model about a picture file and a video file.

Run:  make demo
"""

import time
from pathlib import Path

from llava_mini.inference.engine import Engine

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
        "Describe the picture.",
    ),
    "clip.mp4": (
        "What moves?",
        "Which way does the purple heart move?",
        "What color is the square?",
        "What happens?",
    ),
}


def main() -> None:
    start = time.perf_counter()
    engine = Engine.load("tiny")
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    print(f"The embedded model: {parameters / 1e6:.1f} million parameters, {engine.model.device}.")
    for name, questions in QUESTIONS.items():
        file = MEDIA / name
        print(f"\nexamples/media/{name}")
        stats = None
        for question in questions:
            answer = engine.ask(question, [file])
            stats = answer.stats
            print(f"  {question:<56}{answer}")
        if stats is not None:
            print(f"  ({stats.frames} frames through {stats.vision_tokens} vision tokens)")
    print(f"\n{time.perf_counter() - start:.1f} seconds in all. Ask your own: llava-mini ask QUESTION FILE")


if __name__ == "__main__":
    main()
