"""What a teacher says stands beside what a pupil says, token by token."""

import pytest
import torch

from llava_mini.flow import ModelInputs
from llava_mini.training.distillation import distillation_loss, taught_logits, with_copies
from llava_mini.training.shared_frames import answer_rows, fuse_shared, supervised_rows
from tests.tiny_models import IMAGE_TOKEN, pixels, tiny_model

SOURCES = torch.tensor([0, 0, 1, 2, 1, 2])


def inputs_of(model):
    """Two questions about an image, then two about a clip, with labels at the answers."""
    i = IMAGE_TOKEN
    rows = torch.tensor([[5, i, 6, 7, 8, 9], [5, i, 9, 8, 3, 3], [5, i, i, 6, 10, 11], [5, i, i, 12, 11, 3]])
    labels = torch.full_like(rows, -100)
    labels[[0, 0, 1, 2, 2, 3], [4, 5, 3, 4, 5, 4]] = rows[[0, 0, 1, 2, 2, 3], [4, 5, 3, 4, 5, 4]]
    features = model.encode_frames(pixels(model.config, 3)).detach()
    return ModelInputs(input_ids=rows, attention_mask=(rows != 3).long(), labels=labels, features=features)


def test_each_vision_token_is_repeated_with_its_mask_and_label():
    model = tiny_model()
    wide = with_copies(inputs_of(model), IMAGE_TOKEN, 3)
    assert wide.input_ids[1].tolist() == [5, *[IMAGE_TOKEN] * 3, 9, 8, 3, 3, 0, 0]
    assert wide.attention_mask[1].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert wide.labels[1].tolist() == [-100] * 5 + [8] + [-100] * 4


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn():
    model = tiny_model()
    inputs = inputs_of(model)
    rows, _ = supervised_rows(model, fuse_shared(model, inputs, SOURCES), SOURCES)
    own = model.language_model.lm_head(rows).float()
    taught = taught_logits(model, inputs, SOURCES, 1)
    torch.testing.assert_close(own, taught)
    assert distillation_loss(own, taught).abs() < 1e-6
    assert distillation_loss(own, taught.roll(1, 0)) > 0.01


def test_what_a_teacher_with_all_patches_says_stands_in_the_order_of_the_prompts():
    teacher = tiny_model(reducer="identity", prefusion_num_layers=0)
    inputs = inputs_of(teacher)
    taught = taught_logits(teacher, inputs, SOURCES, 1)
    wide = with_copies(inputs, IMAGE_TOKEN, teacher.config.tokens_per_frame)
    plain = teacher(
        input_ids=wide.input_ids,
        attention_mask=wide.attention_mask,
        labels=wide.labels,
        pixel_values=pixels(teacher.config, 3)[SOURCES],
    ).logits[:, :-1][wide.labels[:, 1:] != -100]
    torch.testing.assert_close(taught, plain, atol=1e-4, rtol=1e-3)


def test_rows_that_share_a_beginning_come_prompt_by_prompt():
    model = tiny_model(reducer="identity", prefusion_num_layers=0)
    inputs = with_copies(inputs_of(model), IMAGE_TOKEN, model.config.tokens_per_frame)
    order = [2, 0, 3, 1]  # clips and images take turns
    frames = torch.tensor([1, 2, 0, 1, 2, 0])
    mixed = ModelInputs(
        input_ids=inputs.input_ids[order],
        attention_mask=inputs.attention_mask[order],
        labels=inputs.labels[order],
        features=inputs.features,
    )
    fused = fuse_shared(model, mixed, frames)
    _, targets = answer_rows(model, fused, frames)
    assert targets.tolist() == fused.labels[fused.labels != -100].tolist()


def test_a_teacher_with_too_few_tokens_is_refused():
    pupil, teacher = tiny_model(reducer_grid=2), tiny_model()
    with pytest.raises(ValueError, match="teacher with 1 tokens a frame cannot read the prompts of a model with 4"):
        taught_logits(teacher, inputs_of(teacher), SOURCES, pupil.config.tokens_per_frame)
