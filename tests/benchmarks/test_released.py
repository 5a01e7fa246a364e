"""The order of work of the released code gives what the order here gives."""

import pytest
import torch

from llava_mini.benchmarks.released import fuse_as_released
from llava_mini.benchmarks.timing import Laps
from llava_mini.flow import FrameChunk, ModelInputs
from tests.tiny_models import batch, pixels, prompt, tiny_model

VARIANTS = [
    {},
    {"reducer_grid": 2, "position_codes": "resized_query_grid", "fuse_token_id_zero": False},
    {"vision_tokens_from": "reducer"},
    {"reducer": "average_pool", "reducer_grid": 2},
    {"reducer": "identity"},
    {"prefusion_num_layers": 0},
    {"resolution_ratio": 2, "reducer_grid": 4},
]


def inputs_of(model, num_frames):
    ids = prompt(model.config, [1, 7, 0], num_frames, [5, 6, 8, 9])
    return ModelInputs(**batch([ids]), pixel_values=pixels(model.config, num_frames))


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_the_released_order_gives_the_same_fused_prompt(fields, num_frames):
    model = tiny_model(**fields)
    inputs = inputs_of(model, num_frames)
    ours, released = model.fuse(inputs), fuse_as_released(model, inputs)
    torch.testing.assert_close(released.inputs_embeds, ours.inputs_embeds, atol=1e-4, rtol=1e-4)
    assert (released.num_frames, released.input_ids.tolist()) == (ours.num_frames, ours.input_ids.tolist())


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_released_order_holds_for_other_families(family):
    model = tiny_model(family)
    inputs = inputs_of(model, 2)
    released = fuse_as_released(model, inputs).inputs_embeds
    torch.testing.assert_close(released, model.fuse(inputs).inputs_embeds, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_parts_are_told_frame_by_frame():
    model, told = tiny_model(), []

    class Told(Laps):
        def __call__(self, part):
            told.append(part)

    fuse_as_released(model, inputs_of(model, 2), Told(device=torch.device("cpu"), by_part=True))
    assert told == ["vision", "reduction", "pre-fusion"] * 2


def test_several_prompts_and_streamed_frames_are_refused():
    model = tiny_model()
    one = batch([prompt(model.config, 1, [5])] * 2)
    with pytest.raises(ValueError, match="one prompt.*got 2 prompts"):
        fuse_as_released(model, ModelInputs(**one, pixel_values=pixels(model.config, 2)))
    chunk = FrameChunk(pixel_values=pixels(model.config, 1), slot=0)
    with pytest.raises(ValueError, match="frames as list_iterator"):
        fuse_as_released(model, ModelInputs(**batch([prompt(model.config, 1, [5])]), pixel_values=iter([chunk])))
