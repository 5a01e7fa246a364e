"""Frames that were seen before, and prompts that share frames, fuse as they do alone and for the first time."""

import pytest
import torch

from llava_mini.flow import FrameChunk, ModelInputs, SeenChunk, SeenFrames, sent
from tests.tiny_models import pixels, tiny_model

VARIANTS = {
    "released order": {},
    "reduced rows pass by": {"vision_tokens_from": "reducer"},
    "all patches": {"reducer": "identity"},
    "no pre-fusion": {"prefusion_num_layers": 0},
    "four tokens": {"reducer_grid": 2},
    "HD": {"resolution_ratio": 2},
    "id 0 is not fused": {"fuse_token_id_zero": False},
}

CASES = [*((name, "llama") for name in VARIANTS), ("released order", "mistral"), ("released order", "qwen3")]


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def prompts(image):
    """Three prompts about a picture and a film, padded on the right."""
    rows = [
        [5, 0, 6, image, 7, 8, image, 9, 10, 11],
        [5, 0, 6, image, 12, image, 13],
        [5, 0, 6, image, 7, image, 9, 10],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [3] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return rows, ids, mask


@pytest.fixture(params=["sdpa", "eager"])
def kernel(request):
    return request.param


@pytest.mark.parametrize(("variant", "family"), CASES)
@torch.inference_mode()
def test_seen_frames_and_shared_prompts_fuse_as_new_ones_one_by_one(variant, family, kernel):
    text = {"sliding_window": 6} if family == "mistral" else {}
    model = tiny_model(family, text=text, **VARIANTS[variant])
    model.set_attn_implementation(kernel)
    picture, film = pixels(model.config, 1, seed=1), pixels(model.config, 5, seed=2)
    rows, ids, mask = prompts(model.config.image_token_id)
    new = [FrameChunk(pixel_values=picture, slot=0), FrameChunk(pixel_values=film, slot=1)]
    alone = [model.fuse(ModelInputs(input_ids=torch.tensor([row]), pixel_values=new)) for row in rows]

    inputs = ModelInputs(input_ids=ids, attention_mask=mask)
    before = model.text_before_frames(inputs)
    assert len(before) == (2 if variant == "id 0 is not fused" else 3)
    seen_film = SeenFrames.join([model.see(film[:2], before), model.see(film[2:], before)])
    seen = [
        SeenChunk(seen=model.see(picture, before), slot=0),
        SeenChunk(seen=seen_film.part(0, 3), slot=1),
        SeenChunk(seen=seen_film.part(3, 5), slot=1),
    ]
    for chunks in (new, seen):
        together = model.fuse(ModelInputs(input_ids=ids, attention_mask=mask, pixel_values=chunks))
        assert together.num_frames == (6, 6, 6)
        for row, one in enumerate(alone):
            length = one.inputs_embeds.shape[1]
            close(together.inputs_embeds[row, :length], one.inputs_embeds[0])
            assert together.attention_mask[row].sum() == length
            assert together.input_ids[row, :length].equal(one.input_ids[0])
            assert together.is_fused[row, :length].equal(one.is_fused[0])
    again = model.fuse(ModelInputs(input_ids=torch.tensor([rows[0]]), pixel_values=seen))
    close(again.inputs_embeds, alone[0].inputs_embeds)


@torch.inference_mode()
def test_the_text_before_frames_is_what_all_prompts_have_in_common():
    model = tiny_model()
    image = model.config.image_token_id
    ids = torch.tensor([[5, 6, 7, image, 8], [5, 6, 9, image, 8]])
    table = model.get_input_embeddings().weight
    close(model.text_before_frames(ModelInputs(input_ids=ids)), table[[5, 6]])
    close(model.text_before_frames(ModelInputs(input_ids=ids[:1])), table[[5, 6, 7]])
    assert len(model.text_before_frames(ModelInputs(input_ids=torch.tensor([[image, 5]])))) == 0
    assert len(model.text_before_frames(ModelInputs(input_ids=torch.tensor([[5, 6]])))) == 0


def test_seen_frames_are_taken_in_any_order():
    pair = (torch.arange(3.0).view(3, 1, 1, 1), torch.arange(3.0).view(3, 1, 1, 1))
    frames = SeenFrames(vision=torch.arange(3.0).view(3, 1, 1), text=torch.zeros(3, 0, 1), keys_values=(pair,))
    assert frames.take([2, 0, 2]).vision.flatten().tolist() == [2, 0, 2]
    assert frames.take([2, 0, 2]).keys_values[0][1].flatten().tolist() == [2, 0, 2]
    assert frames.take([0, 1, 2]) is frames
    assert [len(part) for part in frames.split(2)] == [2, 1]


def test_frames_that_share_a_prompt_carry_its_labels():
    model = tiny_model()
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, 7, 8]])
    chunk = FrameChunk(pixel_values=pixels(model.config, 3), slot=0)
    fused = model.fuse(ModelInputs(input_ids=ids, labels=torch.tensor([[-100, -100, -100, 8]]), pixel_values=[chunk]))
    assert fused.labels is not None
    assert fused.labels.tolist() == [[-100] * 5 + [8]]
    assert fused.is_fused.tolist() == [[True, False, False, False, True, False]]


def test_a_gpu_is_sent_what_the_host_holds_without_being_waited_for(monkeypatch):
    how = []
    there, pinned = torch.zeros(2, device="meta"), torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, **options: how.append(options) or tensor)
    cuda = torch.device("cuda")
    assert sent(torch.zeros(2), cuda) is pinned  # only from there a copy goes by itself
    assert sent(there, cuda) is there
    assert sent(there, torch.device("cpu")) is there
    assert how == [{"non_blocking": True}, {}, {}]
