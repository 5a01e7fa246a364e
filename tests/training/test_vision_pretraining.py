import numpy as np
import torch
from transformers import CLIPVisionConfig

from llava_mini.data.synthetic.scenes import SceneSettings, random_scene
from llava_mini.data.synthetic.splits import generator_of
from llava_mini.model.vision import encode_views
from llava_mini.training.vision_pretraining import (
    LABEL_CLASSES,
    DenseVisionModel,
    VisionPretraining,
    dense_loss,
    grid_codes,
    labelled,
    normalised,
)

CONFIG = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=96, patch_size=8
)


def task(**fields):
    torch.manual_seed(0)
    defaults = {"num_steps": 4, "batch_size": 2, "dtype": torch.float32, "settings": SceneSettings()}
    return VisionPretraining(CONFIG, **{**defaults, **fields})


def test_features_are_those_that_the_model_reads():
    torch.manual_seed(0)
    dense = DenseVisionModel(CONFIG).eval()
    pixels = torch.randn(2, 3, 96, 96)
    features = dense.features(pixels)
    assert features.shape == (2, 144, 32)
    torch.testing.assert_close(features, encode_views(dense.tower, pixels))


def test_the_last_layer_gets_no_gradient():
    training = task()
    training.losses(training.make_batch(0)).total.backward()
    without = {name for name, parameter in training.module.named_parameters() if parameter.grad is None}
    assert without
    assert all(name.startswith(("tower.encoder.layers.2.", "tower.post_layernorm.")) for name in without)


def test_batches_depend_on_the_step_alone():
    first, again, next_one = task().make_batch(1), task().make_batch(1), task().make_batch(2)
    assert np.array_equal(first.pixels, again.pixels)
    assert not np.array_equal(first.pixels, next_one.pixels)


def test_the_share_of_pages_changes_over_the_steps():
    letters = [
        sum(
            (task(pages=(1.0, 0.0), num_steps=2, batch_size=8).make_batch(step).labels["character"] > 0).sum()
            for _ in (0,)
        )
        for step in (0, 2)
    ]
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


def test_normalised_pixels_have_the_statistics_of_clip():
    values = normalised(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8), torch.float32)
    expected = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor(expected))


def test_codes_of_the_grid_differ_everywhere():
    codes = grid_codes(12, 32)
    assert codes.shape == (144, 32)
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 0.1
