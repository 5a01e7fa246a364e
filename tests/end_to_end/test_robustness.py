"""The embedded model meets pictures and questions unlike its world: it answers, and the answer ends by itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini import Engine

QUESTIONS = ("What color is the star?", "How many things are there?", "Describe the picture.", "What is written?")
UNHEARD = (
    "What sound does it make?",
    "What does it smell like?",
    "How heavy is the circle?",
    "Who made the picture?",
    "Why is it here?",
)
"""No picture holds the answer to these."""
ROOM = 120
"""Tokens within which an answer has to end. The longest right answer of the world has fewer."""


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def landscape() -> Image.Image:
    """Something like a photograph: a sky that fades into hills, with grain."""
    y, x = np.mgrid[0:240, 0:320]
    hills = y > 140 + 30 * np.sin(x / 40) + 12 * np.sin(x / 11)
    sky = np.stack([120 + y / 3, 160 + y / 4, 235 - y / 8], axis=-1)
    ground = np.stack([60 + x / 8, 110 - y / 6, 40 + x / 20], axis=-1)
    pixels = np.where(hills[..., None], ground, sky) + np.random.default_rng(1).normal(0, 8, (240, 320, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def see_through() -> Image.Image:
    picture = noise(64, 64).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((64, 64)))
    return picture


PICTURES = {
    "black": Image.new("RGB", (96, 96), "black"),
    "white": Image.new("RGB", (96, 96), "white"),
    "red": Image.new("RGB", (336, 336), "red"),
    "noise": noise(96, 96),
    "one pixel": Image.new("RGB", (1, 1), "blue"),
    "very wide": noise(17, 4000),
    "very high": noise(4000, 17),
    "grey": landscape().convert("L"),
    "see-through": see_through(),
    "palette": landscape().convert("P", palette=Image.Palette.ADAPTIVE, colors=16),
    "two levels": landscape().convert("1"),
    "like a photograph": landscape(),
}

PICTURE = Image.open(Path(__file__).parents[2] / "examples" / "media" / "picture.png").convert("RGB")
"""One of its world."""


@pytest.fixture(scope="module")
def engine():
    torch.set_num_threads(1)
    return Engine.load(device="cpu")


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_unlike_the_world_is_answered_and_the_answer_ends(engine, name):
    for question in (*QUESTIONS, *UNHEARD):
        answer = engine.ask(question, [PICTURES[name]], max_tokens=ROOM)
        assert answer.text.strip(), question
        assert answer.stats.finish_reason == "stop", f"{question} {answer.text}"


def test_a_clip_unlike_the_world_is_answered_and_the_answer_ends(engine):
    for frames in ([noise(32, 48)], [PICTURES["black"], PICTURES["white"]] * 6, [landscape()] * 30):
        for question in ("What moves?", "What happens?", "How many things appear?"):
            answer = engine.ask(question, [iter(frames)], max_tokens=ROOM)
            assert answer.stats.frames == len(frames)
            assert answer.text.strip()
            assert answer.stats.finish_reason == "stop", f"{question} {answer.text}"


def test_odd_questions_are_answered_and_the_answer_ends(engine):
    for question in (".", "?!", "a", "STAR", "qzxv wpfj", "\u00bfDe qu\u00e9 color?", "Where is it? " * 20):
        answer = engine.ask(question, [landscape()], max_tokens=ROOM)
        assert answer.stats.finish_reason == "stop", f"{question} {answer.text}"


def test_a_question_longer_than_the_context_is_refused_with_both_lengths(engine):
    context = engine.model.config.text.max_position_embeddings
    with pytest.raises(ValueError, match=f"context holds {context}"):
        engine.ask("What is it? " * context, [PICTURES["black"]])


def test_an_empty_picture_holds_nothing_that_is_asked_for(engine):
    answer = engine.ask("Is there a red circle?", [PICTURES["black"]], max_tokens=ROOM)
    assert answer.text.strip() == "no"


@pytest.mark.parametrize("picture", [PICTURE, PICTURES["noise"]], ids=["of its world", "noise"])
def test_what_no_picture_tells_is_said_to_be_so(engine, picture):
    for question in UNHEARD:
        assert engine.ask(question, [picture], max_tokens=ROOM).text.strip() == "I can't tell", question
