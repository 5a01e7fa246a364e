import itertools

import numpy as np
import pytest

from llava_mini.data.synthetic.drawing import draw_scene
from llava_mini.data.synthetic.scenes import (
    BACKGROUNDS,
    CANVAS,
    CHARACTERS,
    SIZES,
    WORDS,
    SceneSettings,
    random_page,
    random_scene,
)
from llava_mini.data.synthetic.splits import generator_of

SCENES = [random_scene(generator_of("train", index)) for index in range(300)]


def test_the_same_index_gives_the_same_scene():
    assert random_scene(generator_of("train", 7)) == random_scene(generator_of("train", 7))


def test_splits_indices_and_streams_give_different_scenes():
    others = [("validation", 7, "scene"), ("test", 7, "scene"), ("train", 8, "scene"), ("train", 7, "other")]
    scenes = [random_scene(generator_of("train", 7))]
    scenes += [random_scene(generator_of(split, index, stream)) for split, index, stream in others]  # pyright: ignore[reportArgumentType]
    assert len(set(map(repr, scenes))) == 5


def test_no_scene_of_one_split_occurs_in_another():
    seen = {repr(scene) for scene in SCENES}
    assert len(seen) == 300
    for split in ("validation", "test"):
        assert not seen & {repr(random_scene(generator_of(split, index))) for index in range(300)}


def test_things_lie_on_the_canvas_and_apart_unless_they_may_overlap():
    apart = SceneSettings(overlap_share=0)
    pairs = 0
    for scene in (random_scene(generator_of("train", index), apart) for index in range(300)):
        for thing in scene.things:
            assert thing.radius < thing.x < CANVAS - thing.radius
            assert thing.radius < thing.y < CANVAS - thing.radius
            assert SIZES[thing.size][0] <= thing.radius <= SIZES[thing.size][1]
        for first in scene.things:
            for second in scene.things:
                if first is not second:
                    pairs += 1
                    distance = (first.x - second.x) ** 2 + (first.y - second.y) ** 2
                    assert distance > (first.radius + second.radius) ** 2
    assert pairs > 1000
    assert any(
        (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < (a.radius + b.radius) ** 2
        for s in SCENES
        for a in s.things
        for b in s.things
        if a is not b
    )


def test_scenes_hold_one_to_eight_things_or_a_chart_or_seldom_nothing():
    scenes = [random_scene(generator_of("train", index), SceneSettings(chart_share=0.2)) for index in range(400)]
    charts = [scene.chart for scene in scenes if scene.chart is not None]
    assert 50 < len(charts) < 110
    assert {len(chart.bars) for chart in charts} == {2, 3, 4, 5}
    counts = [len(scene.things) for scene in scenes if scene.chart is None]
    assert set(counts) == set(range(9))
    assert counts.count(0) < 0.06 * len(counts)
    for chart in charts:
        values = [bar.value for bar in chart.bars]
        assert values.count(max(values)) == values.count(min(values)) == 1
        assert len({bar.colour for bar in chart.bars}) == len(values)
        assert all(a.left + a.width < b.left for a, b in itertools.pairwise(chart.bars))
        assert chart.bars[0].left >= 5
        assert chart.bars[-1].left + chart.bars[-1].width <= CANVAS - 4
        assert all(chart.ground - bar.value * chart.unit - 2 - chart.digit_size >= 3 for bar in chart.bars)


def test_scenes_hold_as_many_things_as_asked_for():
    settings = SceneSettings(min_things=2, max_things=2, sign_share=0)
    counts = [len(random_scene(generator_of("test", index), settings).things) for index in range(100)]
    assert set(counts) <= {1, 2}
    assert counts.count(2) > 90


def test_places_are_named_by_thirds_of_the_canvas():
    places = {
        (thing.place, thing.x < 32, thing.x >= 64, thing.y < 32, thing.y >= 64) for s in SCENES for thing in s.things
    }
    assert len(places) == 9
    assert ("top left", True, False, True, False) in places
    assert ("right", False, True, False, False) in places


def test_a_page_is_full_of_known_characters():
    pages = [random_page(generator_of("train", index)) for index in range(50)]
    assert all(set(sign.text) <= set(CHARACTERS) for page in pages for sign in page.signs)
    assert sum(len(sign.text) for page in pages for sign in page.signs) > 50 * 12
    assert set("".join(WORDS).upper()) <= set(CHARACTERS)


def test_an_unknown_split_a_negative_index_and_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        generator_of("dev", 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must be 0 or more"):
        generator_of("train", -1)
    with pytest.raises(ValueError, match="min_things"):
        SceneSettings(min_things=3, max_things=2)


def test_some_pictures_of_nothing_look_like_no_other():
    settings = SceneSettings(empty_share=1.0, sign_share=0.0)
    scenes = [random_scene(generator_of("train", index), settings) for index in range(200)]
    assert not any(scene.things for scene in scenes)
    muted = [all(80 < value < 210 for value in scene.background.colour) for scene in scenes]
    assert 60 < sum(muted) < 140
    odd = [scene for scene, is_muted in zip(scenes, muted, strict=True) if not is_muted]
    assert {scene.background.kind for scene in odd} == {*BACKGROUNDS, "static"}
    static = next(scene for scene in odd if scene.background.kind == "static")
    assert np.asarray(draw_scene(static)).std() > 60
