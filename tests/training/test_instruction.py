"""The loss of both stages: that of the model itself, in pieces, and 0 where nothing is taught."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llava_mini.data.tuning_batch import TuningBatch
from llava_mini.flow import ModelInputs
from llava_mini.training.instruction import InstructionTask, answer_loss
from tests.tiny_models import batch, pixels, prompt, tiny_model


def tuning_batch(model, *, with_frames=True):
    """Two prompts, the first one about a frame; their last tokens are answers."""
    frames = 1 if with_frames else 0
    inputs = batch([prompt(model.config, [5, 6], frames, [7, 8, 9, 10]), [11, 12, 13]])
    labels = torch.full_like(inputs["input_ids"], -100)
    first = 2 + frames * model.config.tokens_per_frame + 2
    labels[0, first : first + 2] = inputs["input_ids"][0, first : first + 2]
    labels[1, 2] = 13
    frame = pixels(model.config, 1) if with_frames else None
    return TuningBatch(inputs=ModelInputs(**inputs, labels=labels, pixel_values=frame), ids=("a", "b"))


def task(model, **options):
    return InstructionTask(model, lambda index: tuning_batch(model), **options)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_the_loss_is_that_of_the_models_own_forward():
    model = tiny_model()
    made = tuning_batch(model)
    expected = model(**{name: value for name, value in vars(made.inputs).items() if value is not None}).loss
    assert torch.allclose(task(model).losses(made).total, expected, atol=1e-5)


def test_a_micro_batch_weighs_as_many_as_it_supervises():
    model = tiny_model()
    made = tuning_batch(model)
    assert task(model).weight(made) == 3
    assert task(model).weight(TuningBatch(inputs=None)) == 0


def test_the_loss_in_pieces_has_the_same_value_and_gradients():
    torch.manual_seed(0)
    head, labels = nn.Linear(8, 20), torch.randint(0, 20, (2, 30))
    labels[:, ::4] = -100
    found = []
    for rows in (1000, 7):
        hidden = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        losses = answer_loss(head, hidden, labels, rows_at_a_time=rows)
        head.zero_grad()
        losses.total.backward()
        found.append((losses.total.detach(), hidden.grad, head.weight.grad.clone(), losses.right["tokens"]))
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(whole, pieces)


def test_a_micro_batch_without_anything_to_learn_gives_zero_and_reaches_every_part():
    model = tiny_model()
    nothing = TuningBatch(inputs=None)
    losses = task(model).losses(nothing)
    assert losses.total == 0
    found = gradients(model, losses.total)
    assert {name.partition(".")[0] for name in found} >= {"projector", "reducer", "prefusion", "language_model"}
    assert not any(gradient.any() for gradient in found.values())


def test_the_idle_frame_of_a_spread_run_changes_neither_loss_nor_gradients():
    model = tiny_model()
    text = tuning_batch(model, with_frames=False)
    alone, spread = (task(model, is_spread=spread).losses(text).total for spread in (False, True))
    torch.testing.assert_close(alone, spread)
    expected, found = gradients(model, alone), gradients(model, spread)
    assert not expected.keys() & {name for name in found if name.startswith(("projector", "reducer", "prefusion"))}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), atol=1e-6, rtol=1e-5)


def test_text_alone_is_no_error_where_only_the_projector_trains():
    model = tiny_model(reducer="identity", prefusion_num_layers=0)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    losses = task(model).losses(tuning_batch(model, with_frames=False))
    found = gradients(model, losses.total)
    assert found.keys() == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    "part", ["projector.linear_1.weight", "reducer.queries", "prefusion.layers.0.block.mlp.up_proj.weight"]
)
def test_a_film_teaches_the_vision_side(part):
    model = tiny_model()
    made = tuning_batch(model)
    ids = prompt(model.config, [5, 6], 3, [7, 8, 9, 10])
    labels = torch.tensor([[-100] * (len(ids) - 2) + ids[-2:]])
    film = replace(made.inputs, **batch([ids]), labels=labels, pixel_values=pixels(model.config, 3))
    found = gradients(model, task(model).losses(TuningBatch(inputs=film, ids=("film",))).total)
    assert found[part].any()
    assert found["language_model.model.embed_tokens.weight"].any()
