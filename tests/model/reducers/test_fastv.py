"""FastV: what it keeps, when it chooses, and that a LLaVA-1.5 becomes one by its configuration alone."""

from typing import Any

import pytest
import torch

from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from tests.model.inside_by_hand import expected, inside_model, plain_twin
from tests.tiny_models import pixels, prompt, tiny_config, tiny_model


def inputs_of(model: LlavaMiniForConditionalGeneration) -> dict[str, Any]:
    ids = torch.tensor([prompt(model.config, [5, 6], 2, [7, 8, 9])])
    return {"input_ids": ids, "pixel_values": pixels(model.config, 2)}


@torch.inference_mode()
def test_keeping_all_patches_is_llava():
    model = inside_model("fastv", reducer_tokens=16)
    twin = plain_twin(model)
    twin.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs_of(model)).logits, twin(**inputs_of(model)).logits)


@torch.inference_mode()
def test_all_but_the_patches_looked_at_most_are_seen_in_the_first_layers_alone():
    model = inside_model("fastv", reducer_layer=1, reducer_tokens=1)
    plain = expected(model, model.fuse(ModelInputs(**inputs_of(model))), 0)
    assert int(plain.stays.sum()) == 5 + 2
    torch.testing.assert_close(model(**inputs_of(model)).logits[0, plain.stays], plain.logits[plain.stays])


@torch.inference_mode()
def test_llava_becomes_fastv_by_configuration_alone(tmp_path):
    llava = tiny_model(reducer="identity", prefusion_num_layers=0)
    llava.save_pretrained(tmp_path)
    model = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, reducer="fastv", reducer_tokens=4).eval()
    plain = expected(model, model.fuse(ModelInputs(**inputs_of(model))), 0, 4)
    output = model.generate(**inputs_of(model), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output[0, -4:], plain.answer)


def test_nothing_is_dropped_while_the_model_trains():
    model = inside_model("fastv").train()
    twin = plain_twin(model).train()
    twin.set_attn_implementation("sdpa")
    assert torch.equal(model(**inputs_of(model)).logits, twin(**inputs_of(model)).logits)


@torch.inference_mode()
def test_an_answer_with_labels_does_not_change_the_choice():
    model = inside_model("fastv")
    inputs = inputs_of(model)
    short = model(**inputs).logits[0]
    longer = torch.cat([inputs["input_ids"], torch.tensor([[20, 21, 22]])], dim=1)
    labels = longer.masked_fill(torch.arange(longer.shape[1]) < short.shape[0], -100)
    inputs["input_ids"] = longer
    torch.testing.assert_close(model(**inputs, labels=labels).logits[0, : len(short)][-3:], short[-3:])
    assert not torch.allclose(model(**inputs).logits[0, : len(short)][-3:], short[-3:])


def test_more_tokens_than_patches_are_refused():
    with pytest.raises(ValueError, match="makes at most 16 tokens of a frame here"):
        tiny_config(reducer="fastv", prefusion_num_layers=0, reducer_tokens=17)
