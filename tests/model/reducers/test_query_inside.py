"""Compression inside the language model: what it learns, and that only compressed rows are read after it."""

import pytest
import torch

from llava_mini.flow import ModelInputs
from tests.model.inside_by_hand import inside_model
from tests.tiny_models import pixels, prompt


def test_queries_learn_from_an_answer_and_so_do_the_layers_before_them():
    model = inside_model("query_inside", text={"num_hidden_layers": 4}).train()
    ids = torch.tensor([prompt(model.config, [5, 6], 2, [7, 8])])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100)
    model(input_ids=ids, pixel_values=pixels(model.config, 2), labels=labels).loss.backward()
    parts = [*model.reducer.named_parameters(), *model.language_model.model.layers[0].named_parameters()]
    assert len(parts) == 9 + 9
    assert all(one.grad is not None and bool(one.grad.any()) for _, one in parts)


@torch.inference_mode()
def test_later_layers_know_of_a_frame_what_the_queries_take():
    model = inside_model("query_inside")
    ids = torch.tensor([prompt(model.config, [5, 6], 1, [7, 8])])
    fused = model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels(model.config, 1)))
    before = model(inputs_embeds=fused.inputs_embeds, **model.inside(fused)).logits[0, -1]
    model.reducer.get_parameter("attend.out_proj.weight").zero_()
    silent = model(inputs_embeds=fused.inputs_embeds, **model.inside(fused)).logits[0, -1]
    assert not torch.allclose(before, silent)
    model.reducer.get_parameter("queries").normal_()
    assert torch.equal(model(inputs_embeds=fused.inputs_embeds, **model.inside(fused)).logits[0, -1], silent)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"reducer_grid": 5}, "reducer_grid=5 rows per side in the places of 4"),
        ({"text": {"hidden_size": 36}}, "language width 36 is not a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        inside_model("query_inside", **fields)
