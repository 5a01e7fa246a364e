"""VoCo: the mask of the source where an image comes first, frames that know of nothing else, and two phases."""

import pytest
import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model.inside import Inside
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers.voco import gather_frames
from tests.model.inside_by_hand import ByHand, causal, expected, inside_model, logits_by_hand, plain_twin
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, prompt, tiny_model


def fuse(model: LlavaMiniForConditionalGeneration, *parts: list[int] | int, seed: int = 0) -> FusedPrompt:
    frames = sum(part for part in parts if isinstance(part, int))
    ids = torch.tensor([prompt(model.config, *parts)])
    return model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels(model.config, frames, seed)))


def logits(model: LlavaMiniForConditionalGeneration, fused: FusedPrompt) -> Tensor:
    return model(inputs_embeds=fused.inputs_embeds, **model.inside(fused)).logits[0]


@pytest.mark.parametrize("number", [1, 2])
@torch.inference_mode()
def test_an_image_that_comes_first_has_the_mask_of_the_source(number: int):
    model = inside_model("voco", reducer_tokens=number)
    fused = fuse(model, 1, [5, 6, 7, 8])
    length = fused.input_ids.shape[1]
    first, last = 16, 16 + number - 1
    row, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = causal(length) & torch.where(row <= last, key <= last, key >= first)
    plain = logits_by_hand(plain_twin(model), fused.inputs_embeds[0], ByHand(lambda _: seen, seen[0]))
    torch.testing.assert_close(logits(model, fused), plain, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_frame_stands_as_its_projected_patches_and_copies_of_one_learned_row():
    model = inside_model("voco", reducer_tokens=3)
    llava = tiny_model(reducer="identity", prefusion_num_layers=0)
    llava.projector.load_state_dict(model.projector.state_dict())
    llava.vision_tower.load_state_dict(model.vision_tower.state_dict())
    rows = fuse(model, 1, [5]).inputs_embeds[0]
    torch.testing.assert_close(rows[:16], fuse(llava, 1, [5]).inputs_embeds[0, :16])
    assert torch.equal(rows[16:19], model.reducer.get_parameter("row").expand(3, -1))


@torch.inference_mode()
def test_a_frame_knows_neither_other_frames_nor_text_after_the_first_one():
    model = inside_model("voco")
    fused, other = fuse(model, [5, 6], 1, [7], 1, [8]), fuse(model, [5, 6], 1, [9], 1, [8])
    others = torch.where(
        fused.input_ids[..., None] == IMAGE_TOKEN, fuse(model, [5, 6], 1, [7], 1, [8], seed=1).inputs_embeds, 0
    )
    mixed = fused.inputs_embeds.clone()
    mixed[:, 2:20] = others[:, 2:20]  # another first frame
    one, two = (logits(model, prompt)[21:39] for prompt in (fused, other))
    three = model(inputs_embeds=mixed, **model.inside(fused)).logits[0, 21:39]
    torch.testing.assert_close(two, one)
    torch.testing.assert_close(three, one)
    assert not torch.allclose(logits(model, fused)[-1], model(inputs_embeds=mixed, **model.inside(fused)).logits[0, -1])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "parts", [(1, [7, 8]), ([5, 6], 1, [7, 8, 9]), ([5], 3, [7, 8]), ([5], 1, [4, 6], 2, [10], 1, [8, 9])]
)
@torch.inference_mode()
def test_two_phases_equal_reading_at_once(parts: tuple[list[int] | int, ...], kernel: str):
    model = inside_model("voco")
    model.set_attn_implementation(kernel)
    fused = fuse(model, *parts)
    cache, position = gather_frames(model.language_model, fused, model.config)
    question = fused.inputs_embeds[:, position:]
    text = sum(len(part) for part in parts[:-1] if isinstance(part, list))
    assert cache.get_seq_length() == text + 2 * sum(part for part in parts if isinstance(part, int))
    assert question.shape[1] == len(parts[-1])  # type: ignore[arg-type]
    places = torch.arange(position, position + question.shape[1])[None]
    answered = model.language_model(
        inputs_embeds=question, position_ids=places, past_key_values=cache, inside=Inside()
    ).logits[0]
    torch.testing.assert_close(answered, expected(model, fused, 0).logits[position:], atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_frames_are_gathered_for_one_prompt():
    model = inside_model("voco")
    rows = batch([prompt(model.config, 1, [7, 8]), prompt(model.config, 1, [7])])
    fused = model.fuse(ModelInputs(**rows, pixel_values=pixels(model.config, 2)))
    with pytest.raises(ValueError, match=r"got 2 prompts of \[20, 19\] rows in 20 places"):
        gather_frames(model.language_model, fused, model.config)
