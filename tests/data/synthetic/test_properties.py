"""Properties of the whole world: every answer is right, answers are balanced, splits do not meet, nothing is chance."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import llava_mini_cli
from llava_mini.data.synthetic.blind import BlindBaseline
from llava_mini.data.synthetic.drawing import draw_scene, shape_mask
from llava_mini.data.synthetic.phrasings import PHRASINGS
from llava_mini.data.synthetic.scenes import BACKGROUNDS, CANVAS
from llava_mini.data.synthetic.scenes import COLOURS as PAINTS
from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS, WorldSettings, world_item
from tests.data.synthetic.oracle import (
    COLOURS,
    PLURALS,
    SHAPES,
    SIZES,
    VERBS,
    answer_about_clip,
    answer_about_picture,
    place_of,
    tracks_of,
)

SPLITS = ("train", "validation", "test")
IMAGES = WorldSettings(min_turns=6, max_turns=6)
CLIPS = WorldSettings(min_turns=6, max_turns=6, clip_share=1.0)

in_every_split = pytest.mark.parametrize("split", SPLITS)


@cache
def items_of(split, settings_name, count=1000):
    settings = {"images": IMAGES, "clips": CLIPS}[settings_name]
    return [world_item(split, index, settings) for index in range(count)]


def all_items(split):
    return items_of(split, "images") + items_of(split, "clips")


def turns_of(split):
    return [turn for item in all_items(split) for turn in item.turns]


@in_every_split
def test_every_answer_about_a_picture_is_what_the_picture_shows(split):
    forms = Counter()
    for item in items_of(split, "images"):
        for turn in item.turns:
            assert turn.answer == answer_about_picture(item.frames[0], turn.form, turn.question), turn
            forms[turn.form] += 1
    assert sum(forms.values()) > 3000
    assert len(forms) >= 28, forms


@in_every_split
def test_every_answer_about_a_clip_is_what_its_frames_show(split):
    forms = Counter()
    for item in items_of(split, "clips"):
        for turn in item.turns:
            expected = answer_about_clip(item.frames, turn.form, turn.question)
            if turn.form == "what happens":  # two things that move at once are told in either order
                assert sorted(turn.answer.split(" and ")) == sorted(expected.split(" and ")), turn
            else:
                assert turn.answer == expected, turn
            forms[turn.form] += 1
    assert sum(forms.values()) > 3000
    assert len(forms) >= 20, forms


@in_every_split
def test_a_question_names_its_choices_and_the_answer_is_one_of_them(split):
    with_choices = [turn for turn in turns_of(split) if turn.choices]
    assert len(with_choices) > 100
    for turn in with_choices:
        assert turn.answer in turn.choices
        names = [choice.removeprefix("the ").removeprefix("there is no ") for choice in turn.choices]
        assert len({turn.question.lower().index(name) for name in names}) == len(names)


def pattern_of(form):
    """The key of ``PHRASINGS`` that a form belongs to."""
    if form.startswith("how many of a "):
        return "how many of a kind"
    return "how many do so" if form.removeprefix("how many ") in VERBS.values() else form


@in_every_split
def test_every_kind_and_every_form_occurs(split):
    kinds = Counter(turn.kind for turn in turns_of(split))
    assert set(kinds) == set(IMAGE_KINDS) | set(CLIP_KINDS)
    assert min(kinds.values()) >= 50, kinds
    assert {pattern_of(turn.form) for turn in turns_of(split)} == set(PHRASINGS)


@in_every_split
def test_every_background_number_of_things_and_font_occurs(split):
    scenes = [item.frames[0] for item in items_of(split, "images")]
    assert {scene.background.kind for scene in scenes} == {*BACKGROUNDS, "static"}
    assert {len(scene.things) for scene in scenes if scene.chart is None} >= set(range(1, 9))
    assert {len(scene.chart.bars) for scene in scenes if scene.chart} == {2, 3, 4, 5}
    assert len({sign.font for scene in scenes for sign in scene.signs}) == 4


@in_every_split
def test_neither_of_two_answers_is_given_much_more_often(split):
    answers = defaultdict(Counter)
    for turn in turns_of(split):
        answers[turn.kind, turn.form][turn.choices.index(turn.answer) if turn.choices else turn.answer] += 1
    two = {form: counts for form, counts in answers.items() if len(counts) == 2}
    assert len(two) >= 14
    for form, counts in two.items():
        total = sum(counts.values())
        slack = 2 * (0.25 / total) ** 0.5  # of a coin that is thrown so often
        assert max(counts.values()) / total < 0.55 + slack, (form, counts)


def test_blind_guesses_are_mostly_wrong():
    train, test = ({kind: [] for kind in (*IMAGE_KINDS, *CLIP_KINDS)} for _ in range(2))
    for split, by_kind in (("train", train), ("test", test)):
        for turn in turns_of(split):
            by_kind[turn.kind].append(turn)
    scores = {kind: BlindBaseline(train[kind]).score(test[kind]) for kind in train}
    for kind in ("cannot tell", "absence", "clip absence"):
        assert scores.pop(kind) == 1, kind  # their answers are alike on purpose: other kinds have the same questions
    assert max(scores.values()) < 0.6, scores
    for kind in ("colour", "shape", "location", "count", "text", "chart", "caption", "clip colour", "clip place"):
        assert scores[kind] < 0.3, (kind, scores[kind])
    assert scores["direction"] < 0.35


def test_splits_share_no_scene_and_no_picture():
    contents, pictures = [], []
    for split in SPLITS:
        items = [world_item(split, index, WorldSettings(clip_share=0.2)) for index in range(2000)]
        shown = [tuple((scene.things, scene.signs, scene.chart) for scene in item.frames) for item in items]
        shown = [frames for frames in shown if frames != (((), (), None),)]  # empty ones differ in the background alone
        contents.append(set(shown))
        pictures.append({draw_scene(scene).tobytes() for item in items for scene in item.frames})
        assert len(contents[-1]) == len(shown) > 1900
    for sets in (contents, pictures):
        for first in range(3):
            for second in range(first):
                assert not sets[first] & sets[second]


def is_phrased(question, phrasing):
    """Whether a question is a phrasing with names, or other words for what a thing does, in its places."""
    name = rf"(?:an? )?(?:(?:{'|'.join((*SIZES, *COLOURS, *SHAPES, *PLURALS, 'things'))})(?: |$|\b))+"
    verb, side = "|".join((*VERBS, *VERBS.values())), "left of|right of|above|below"
    pattern = re.escape(phrasing.lower().rstrip("?."))
    for place in ("a", "b"):
        pattern = pattern.replace(rf"\{{{place}\}}", name)
    pattern = pattern.replace(r"\{side\}", f"(?:{side})")
    pattern = re.sub(r"\\{(?:do|does|does_too|event)\\}", f"(?:{verb})", pattern)
    return re.fullmatch(pattern, question.lower().rstrip("?.")) is not None


def test_held_out_phrasings_are_asked_in_the_test_split_only():
    seen = defaultdict(set)
    for split in ("train", "validation"):
        for turn in turns_of(split):
            assert not turn.held_out
            seen[turn.form].add(re.split(r"(?:\. |: )(?=[A-Z])", turn.question)[-1])
    test = turns_of("test")
    assert 0.15 < sum(turn.held_out for turn in test) / len(test) < 0.4
    for form, phrasings in PHRASINGS.items():
        forms = [name for name in seen if pattern_of(name) == form]
        questions = [question for name in forms for question in seen[name]]
        assert sum(is_phrased(question, phrasing) for question in questions for phrasing in phrasings) >= 5, form
        for phrasing in phrasings[-2:]:
            assert not [question for question in questions if is_phrased(question, phrasing)]
            asked = [turn for turn in test if turn.form in forms and is_phrased(turn.question, phrasing)]
            assert all(turn.held_out for turn in asked), phrasing


def visible_pixels(scene):
    """For each thing of a scene, the pixels where it is seen whole: not at its edge, and not covered."""
    masks = []
    for thing in scene.things:
        mask = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
        shape = np.asarray(shape_mask(thing.shape, 2 * thing.radius))
        top, left = round(thing.y - thing.radius), round(thing.x - thing.radius)
        mask[top : top + len(shape), left : left + len(shape)] = shape
        masks.append(mask)
    seen = []
    for index, mask in enumerate(masks):
        covered = np.any([other > 0 for other in masks[index + 1 :]], axis=0) if index + 1 < len(masks) else False
        seen.append((mask == 255) & ~np.asarray(covered))
    return seen, [mask == 255 for mask in masks]


def test_each_thing_of_a_picture_is_seen_in_the_colour_it_has_by_name():
    table = np.asarray(list(PAINTS.values()))
    checked = 0
    for item in items_of("validation", "images")[:400]:
        picture = np.asarray(draw_scene(item.frames[0]), dtype=int)
        for thing, seen, whole in zip(item.frames[0].things, *visible_pixels(item.frames[0]), strict=True):
            assert seen.sum() > 0.3 * whole.sum()
            assert seen.sum() >= 15
            colour = np.median(picture[seen], axis=0)
            assert tuple(PAINTS)[np.abs(table - colour).sum(axis=1).argmin()] == thing.colour
            checked += 1
    assert checked > 1000


@in_every_split
def test_a_thing_whose_place_is_asked_for_can_be_seen_in_that_frame(split):
    asked = covered = 0
    for item in items_of(split, "clips"):
        for turn in item.turns:
            if turn.kind != "clip place":
                continue
            frame = item.frames[0 if turn.form == "where at the start" else -1]
            (index,) = [i for i, thing in enumerate(frame.things) if thing.name in turn.question.lower()]
            assert place_of(frame.things[index]) == turn.answer
            seen, whole = visible_pixels(frame)
            asked += 1
            covered += seen[index].sum() < 0.3 * whole[index].sum()
    assert asked > 500
    assert covered == 0


def test_no_more_than_one_thing_of_a_clip_has_a_name_at_any_time():
    for item in items_of("test", "clips"):
        names = [{thing.name for thing in track.seen} for track in tracks_of(item.frames)]
        assert sum(map(len, names)) == len(set.union(*names))


DIGEST = """
import hashlib
from llava_mini.data.synthetic.world import WorldSettings, world_item
digest = hashlib.sha256()
for index in range(60):
    item = world_item("train", index, WorldSettings(min_turns=1, max_turns=5, clip_share=0.3))
    record = item.record()
    for picture in record.video or [record.image]:
        digest.update(picture.tobytes())
    digest.update(repr((item.turns, item.description, item.things)).encode())
found = digest.hexdigest()
"""


def test_another_process_with_other_hashes_draws_the_same():
    here = {}
    exec(DIGEST, here)
    environment = {**os.environ, "PYTHONPATH": str(Path(llava_mini_cli.__file__).parent), "OMP_NUM_THREADS": "1"}
    environment["PYTHONHASHSEED"] = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    program = [sys.executable, "-c", DIGEST + "print(found)"]
    told = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == here["found"]
