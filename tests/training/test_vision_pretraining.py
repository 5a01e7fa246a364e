import random

import numpy as np
import pytest
import torch

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.data.collate import MAX_NAMES
from llava_mini.data.synthetic.scenes import CANVAS, COLOURS, SHAPES, SceneSettings, random_scene
from llava_mini.data.synthetic.splits import generator_of
from llava_mini.model.reducers.average_pool import AveragePool
from llava_mini.model.reducers.query import QueryReducer
from llava_mini.training.vision_pretraining import (
    LABEL_CLASSES,
    VisionPretraining,
    dense_loss,
    labelled,
    named_things,
    normalised,
)

TINY = preset("tiny")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIG = LlavaMiniConfig(vision_config={**TINY.vision.to_dict(), **SMALL}, text_config=TINY.text.to_dict())


def task(**fields):
    torch.manual_seed(0)
    defaults = {"num_steps": 4, "batch_size": 2, "dtype": torch.float32, "settings": SceneSettings()}
    return VisionPretraining(CONFIG, AveragePool(CONFIG), **{**defaults, **fields})


def test_the_last_layer_gets_no_gradient():
    training = task()
    training.losses(training.make_batch(0)).total.backward()
    without = {name for name, parameter in training.module.named_parameters() if parameter.grad is None}
    assert without
    assert all(name.startswith(("tower.encoder.layers.2.", "tower.post_layernorm.")) for name in without)


def test_batches_depend_on_the_step_alone():
    first, again, next_one = task().make_batch(1), task().make_batch(1), task().make_batch(2)
    assert np.array_equal(first.pictures.pixels, again.pictures.pixels)
    assert torch.equal(first.things.names, again.things.names)
    assert not np.array_equal(first.pictures.pixels, next_one.pictures.pixels)


def test_the_share_of_pages_changes_over_the_steps():
    make_batch = task(pages=(1.0, 0.0), num_steps=2, batch_size=8).make_batch
    letters = [(make_batch(step).pictures.labels["character"] > 0).sum() for step in (0, 2)]
    assert letters[0] > 2 * letters[1]


def test_every_label_has_a_class_for_each_value():
    scenes = [random_scene(generator_of("train", index)) for index in range(50)]
    batch = labelled(scenes, 8)
    assert set(batch.labels) == set(LABEL_CLASSES)
    for name, values in batch.labels.items():
        assert values.shape == (50, 144)
        assert 0 <= values.min() <= values.max() < LABEL_CLASSES[name]


def test_the_loss_weighs_what_is_shown_and_what_is_not_apart():
    logits = torch.zeros(1, 4, 2)
    logits[0, 0, 1] = 10.0
    few, many = torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0]])
    assert dense_loss(logits, few) < dense_loss(logits, many)


def test_names_are_half_of_things_that_are_there():
    scene = random_scene(generator_of("train", 5), SceneSettings(min_things=3, max_things=3, distractor_share=0.0))
    named = named_things(random.Random(0), scene, 7)
    found = [(tuple(COLOURS)[colour], SHAPES[shape]) for colour, shape in named.names.tolist()]
    assert set(named.pictures.tolist()) == {7}
    assert named.present.tolist() == [1, 1, 1, 0, 0, 0]
    assert found[:3] == [(thing.colour, thing.shape) for thing in scene.things]
    assert not {f"{colour} {shape}" for colour, shape in found[3:]} & {thing.name for thing in scene.things}
    assert named.places[0].tolist() == pytest.approx([scene.things[0].x / CANVAS, scene.things[0].y / CANVAS])


@pytest.mark.parametrize("count", [0, MAX_NAMES + 1])
def test_scenes_with_nothing_or_too_many_things_are_not_asked_about_as_a_whole(count):
    settings = SceneSettings(min_things=count, max_things=count, distractor_share=0.0, sign_share=0.0)
    scenes = [random_scene(generator_of("train", index), settings) for index in range(20)]
    full = [scene for scene in scenes if len(scene.unique_things) == count]
    assert full
    assert all(len(named_things(random.Random(0), scene, 0).names) == 0 for scene in full)


def test_the_reducer_learns_with_the_encoder():
    torch.manual_seed(0)
    reducer = QueryReducer(CONFIG)
    reducer.init_weights()
    training = VisionPretraining(
        CONFIG, reducer, num_steps=4, batch_size=4, dtype=torch.float32, settings=SceneSettings(max_things=2)
    )
    training.losses(training.make_batch(0)).total.backward()
    assert all(parameter.grad is not None for parameter in reducer.parameters())


def test_normalised_pixels_have_the_statistics_of_clip():
    values = normalised(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8), torch.float32)
    expected = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor(expected))
