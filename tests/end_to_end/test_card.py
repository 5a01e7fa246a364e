"""The embedded model reaches what its card says.

Part of the card's questions are asked again. The same weights give the same answers but for rounding, so hardly any
mark may differ; and the score of that part must agree with the card's score of all other questions.
"""

from dataclasses import replace

import pytest
import torch
import yaml

from llava_mini import Engine
from llava_mini.checkpoint.locate import locate
from llava_mini.evaluation.bench import Bench, run_bench
from llava_mini.evaluation.card import BEGIN, card_table, marks_by_kind, read_scores, weights_digest, with_table
from llava_mini.evaluation.exact_match import CAPTION_KINDS
from llava_mini.evaluation.intervals import Z_999, difference
from llava_mini.recipes.tiny import tiny_settings

ASKED_AGAIN = 16
"""Questions of each kind about images; half as many about clips."""
MOST_FLIPS = 0.02
"""Share of marks that rounding on another machine may change."""
REMAKE = "Make the card again with: make gallery"


@pytest.fixture(scope="module")
def card():
    return read_scores(locate("tiny"))


@pytest.fixture(scope="module")
def bench(card):
    return Bench(world=tiny_settings().world, split=card["split"], questions=card["questions_per_kind"])


def test_the_card_belongs_to_these_weights_and_questions(card, bench):
    assert card["weights_sha256"] == weights_digest(locate("tiny")), f"The weights are not the card's. {REMAKE}"
    assert card["questions_sha256"] == bench.fingerprint(), f"The world asks other questions now. {REMAKE}"


def test_the_table_on_the_card_shows_the_scores_of_its_file(card):
    page = (locate("tiny") / "README.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == 1
    assert page == with_table(page, card_table(card)), REMAKE


def test_the_card_says_in_its_header_what_the_hub_asks_for():
    _, header, _ = (locate("tiny") / "README.md").read_text(encoding="utf-8").split("---\n", maxsplit=2)
    fields = yaml.safe_load(header)
    assert (fields["license"], fields["pipeline_tag"]) == ("apache-2.0", "image-text-to-text")
    assert "llava-mini" in fields["tags"]


def test_the_card_has_a_score_for_every_kind_that_is_asked(card, bench):
    kinds = bench.weights.kinds
    assert set(card["scores"]) >= {*kinds, "images", "clips", "all", "known phrasings", "new phrasings"}
    assert {kind: len(marks) for kind, marks in card["marks"].items()} == {
        kind: bench.asked(kind) for kind in kinds if kind not in CAPTION_KINDS
    }


def test_the_model_answers_as_its_card_says(card, bench):
    torch.set_num_threads(1)
    engine = Engine.load(device="cpu", dtype="float32")
    part = replace(bench, questions=ASKED_AGAIN)
    kinds = [kind for kind in part.weights.kinds if kind not in CAPTION_KINDS]
    now = marks_by_kind(run_bench(engine.model, engine.processor, part, kinds=kinds))

    same = {kind: card["marks"][kind][: part.asked(kind)] for kind in kinds}
    flips = [kind for kind in kinds for old, new in zip(same[kind], now[kind], strict=True) if old != new]
    assert len(flips) <= MOST_FLIPS * sum(len(marks) for marks in now.values()), f"Marks differ in: {flips}"

    asked, others = "".join(now.values()), "".join(card["marks"][kind][part.asked(kind) :] for kind in kinds)
    _, best = difference(asked.count("1") / len(asked), len(asked), others.count("1") / len(others), len(others), Z_999)
    assert best >= 0, f"{asked.count('1')} of {len(asked)} right, {others.count('1')} of {len(others)} on the card"
