import itertools

import numpy as np
import pytest

from llava_mini.data.synthetic.drawing import draw_scene, letter_boxes, patch_labels, shape_mask
from llava_mini.data.synthetic.scenes import (
    CHARACTERS,
    COLOURS,
    SHAPES,
    SIZES,
    Background,
    Scene,
    Sign,
    Thing,
    generator_of,
    random_scene,
)

PLAIN = Background(kind="plain", colour=(140, 140, 140), seed=0)
BLUE_SQUARE = Thing(shape="square", colour="blue", size="large", radius=14, x=28, y=60)
SIGN = Sign(text="CAT", x=48, y=20, height=18, ink=(0, 0, 0), plate=None, bold=False)


def test_a_scene_is_drawn_the_same_every_time():
    scene = random_scene(generator_of("train", 3))
    assert np.array_equal(np.asarray(draw_scene(scene)), np.asarray(draw_scene(scene)))


def test_the_middle_of_a_thing_has_its_colour():
    picture = draw_scene(Scene(things=(BLUE_SQUARE,), signs=(), background=PLAIN))
    assert picture.size == (96, 96)
    assert picture.getpixel((28, 60)) == COLOURS["blue"]
    assert picture.getpixel((80, 10)) == (140, 140, 140)


def test_a_scene_can_be_drawn_larger():
    picture = draw_scene(Scene(things=(BLUE_SQUARE,), signs=(SIGN,), background=PLAIN), side=288)
    assert picture.size == (288, 288)
    assert picture.getpixel((84, 180)) == COLOURS["blue"]


def test_labels_say_what_a_patch_shows():
    labels = patch_labels(Scene(things=(BLUE_SQUARE,), signs=(SIGN,), background=PLAIN))
    inside = 7 * 12 + 3  # row 7, column 3 holds the point (28, 60)
    assert labels.shape.shape == (144,)
    assert labels.shape[inside] == 1 + SHAPES.index("square")
    assert labels.colour[inside] == 1 + list(COLOURS).index("blue")
    assert labels.size[inside] == 1 + list(SIZES).index("large")
    assert (labels.column[inside], labels.row[inside]) == (1 + 28 * 12 // 96, 1 + 60 * 12 // 96)
    assert labels.shape[0] == labels.character[0] == 0
    assert {CHARACTERS[value - 1] for value in labels.character if value} == {"C", "A", "T"}
    assert set(labels.order[labels.character == 1 + CHARACTERS.index("A")]) == {2}


def test_letters_stand_side_by_side_around_the_middle_of_the_sign():
    boxes = [box for _, box in letter_boxes(SIGN)]
    assert all(left[2] <= right[0] + 1e-6 for left, right in itertools.pairwise(boxes))
    assert abs((boxes[0][0] + boxes[-1][2]) / 2 - SIGN.x) <= 1


def test_every_shape_has_a_mask_of_its_own():
    masks = [np.asarray(shape_mask(shape, 24)) for shape in SHAPES]
    assert len({mask.tobytes() for mask in masks}) == len(SHAPES) == 8
    assert all(mask.shape == (24, 24) and 0.2 < (mask > 127).mean() < 0.9 for mask in masks)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="Unknown shape 'blob'"):
        shape_mask("blob", 8)
