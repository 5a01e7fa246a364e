import itertools
from dataclasses import replace

import numpy as np
import pytest

from llava_mini.data.synthetic.charts import Bar, Chart
from llava_mini.data.synthetic.drawing import (
    BAR,
    LABEL_CLASSES,
    draw_background,
    draw_scene,
    letter_boxes,
    patch_labels,
    shape_mask,
)
from llava_mini.data.synthetic.fonts import FONTS
from llava_mini.data.synthetic.scenes import (
    BACKGROUNDS,
    CHARACTERS,
    COLOURS,
    SHAPES,
    SIZES,
    WORDS,
    Background,
    Scene,
    SceneSettings,
    Sign,
    Thing,
    random_page,
    random_scene,
)
from llava_mini.data.synthetic.splits import generator_of

PLAIN = Background(kind="plain", colour=(140, 140, 140), seed=0)
BLUE_SQUARE = Thing(shape="square", colour="blue", size="large", radius=14, x=28, y=60)
CHART = Scene(
    things=(),
    signs=(),
    background=PLAIN,
    chart=Chart(
        bars=(Bar(colour="red", value=4, left=10, width=20), Bar(colour="blue", value=9, left=50, width=20)),
        ground=88,
        unit=6,
        plate=220,
        font="sans",
        digit_size=14,
    ),
)
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
    assert labels["shape"].shape == (144,)
    assert labels["shape"][inside] == 1 + SHAPES.index("square")
    assert labels["colour"][inside] == 1 + list(COLOURS).index("blue")
    assert labels["size"][inside] == 1 + list(SIZES).index("large")
    assert (labels["column"][inside], labels["row"][inside]) == (1 + 28 * 12 // 96, 1 + 60 * 12 // 96)
    assert labels["shape"][0] == labels["character"][0] == 0
    assert {CHARACTERS[value - 1] for value in labels["character"] if value} == {"C", "A", "T"}
    of_the_a = labels["character"] == 1 + CHARACTERS.index("A")
    assert set(labels["order"][of_the_a]) == {2}
    assert set(labels["word"][of_the_a]) == {1 + WORDS.index("cat")}
    spelling = [set(labels[f"letter {place}"][of_the_a]) for place in range(1, 5)]
    assert spelling == [{1 + CHARACTERS.index(character)} for character in "CAT"] + [{0}]


def test_patches_of_a_chart_tell_colour_and_value_of_their_bar():
    picture, labels = draw_scene(CHART), patch_labels(CHART)
    assert picture.getpixel((20, 80)) == COLOURS["red"]
    assert picture.getpixel((20, 30)) == (220, 220, 220)
    inside = 10 * 12 + 2  # holds the point (20, 80)
    found = {name: values[inside] for name, values in labels.items()}
    assert (found["shape"], found["colour"], found["value"]) == (BAR, 1 + list(COLOURS).index("red"), 4)
    assert {CHARACTERS[value - 1] for value in labels["character"] if value} == {"4", "9"}


def test_labels_stay_within_their_classes():
    settings = SceneSettings(chart_share=0.3, sign_share=0.5)
    scenes = [random_scene(generator_of("train", index), settings) for index in range(200)]
    scenes += [random_page(generator_of("train", index)) for index in range(150)]
    largest = dict.fromkeys(LABEL_CLASSES, 0)
    for scene in scenes:
        for name, values in patch_labels(scene).items():
            assert values.min() >= 0
            largest[name] = max(largest[name], int(values.max()))
    assert largest == {name: classes - 1 for name, classes in LABEL_CLASSES.items()}


def test_letters_stand_side_by_side_around_the_middle_of_the_sign():
    for font in FONTS:
        scene = Scene(things=(), signs=(replace(SIGN, font=font),), background=PLAIN)
        boxes = [box for _, _, box in letter_boxes(scene)]
        assert all(left[2] <= right[0] + 1e-6 for left, right in itertools.pairwise(boxes))
        assert abs((boxes[0][0] + boxes[-1][2]) / 2 - SIGN.x) <= 1


def test_ink_lies_in_the_boxes_of_the_letters_in_every_font():
    for font in FONTS:
        scene = Scene(things=(), signs=(replace(SIGN, font=font, height=20),), background=PLAIN)
        ink = np.asarray(draw_scene(scene).convert("L")) < 70
        boxed = np.zeros_like(ink)
        for _, _, (left, top, right, bottom) in letter_boxes(scene):
            boxed[round(top) - 1 : round(bottom) + 2, round(left) - 1 : round(right) + 2] = True
            assert ink[round(top) : round(bottom) + 1, round(left) : round(right) + 1].sum() > 15
        assert not (ink & ~boxed).any()


def test_fonts_and_backgrounds_look_different():
    pictures = {
        draw_scene(Scene(things=(), signs=(replace(SIGN, font=font),), background=PLAIN)).tobytes() for font in FONTS
    }
    assert len(pictures) == 4
    backgrounds = {kind: np.asarray(draw_background(replace(PLAIN, kind=kind, seed=3))) for kind in BACKGROUNDS}
    assert len({pixels.tobytes() for pixels in backgrounds.values()}) == 6
    assert backgrounds["plain"].std() == 0
    assert all(
        5 < abs(pixels.mean() - 140) + pixels.std() < 60 for kind, pixels in backgrounds.items() if kind != "plain"
    )


def test_every_shape_has_a_mask_of_its_own():
    masks = [np.asarray(shape_mask(shape, 24)) for shape in SHAPES]
    assert len({mask.tobytes() for mask in masks}) == len(SHAPES) == 8
    assert all(mask.shape == (24, 24) and 0.2 < (mask > 127).mean() < 0.9 for mask in masks)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="Unknown shape 'blob'"):
        shape_mask("blob", 8)
