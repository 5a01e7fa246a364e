"""``fuse`` against the plain one-pass form, over every kind of configuration and batch."""

import itertools
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from llava_mini.flow import FrameChunk, ModelInputs
from llava_mini.model import splice
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from tests.model.one_pass import fuse_one_pass
from tests.tiny_models import batch, pixels, prompt, tiny_config, tiny_model

SHAPES = [
    {"reducer": "query"},
    {"reducer": "query", "reducer_grid": 2, "position_codes": "resized_query_grid"},
    {"reducer": "query", "vision_tokens_from": "reducer"},
    {"reducer": "query", "prefusion_num_layers": 0},
    {"reducer": "query", "prefusion_num_layers": 1},
    {"reducer": "query", "reducer_grid": 2, "resolution_ratio": 2},
    {"reducer": "average_pool", "reducer_grid": 2},
    {"reducer": "identity"},
    {"reducer": "identity", "vision_tokens_from": "reducer"},
    {"reducer": "identity", "prefusion_num_layers": 0},
    {"reducer": "identity", "resolution_ratio": 2},
]


def visible(model: LlavaMiniForConditionalGeneration, inputs: ModelInputs) -> torch.Tensor:
    config = model.config
    return splice.fusible(
        inputs,
        image_token_id=config.image_token_id or 0,
        fuse_token_id_zero=config.fuse_token_id_zero,
        fuse_answers=config.fuse_answers,
    )


def mixed_batch(model: LlavaMiniForConditionalGeneration, side: str = "right") -> ModelInputs:
    """Image, two images, video, text only, and an image after the text, in one batch."""
    config = model.config
    prompts = [
        prompt(config, [5, 6], 1, [7, 8, 9]),
        prompt(config, [5], 1, [4], 1, [9, 10, 11, 12]),
        prompt(config, [6], 3, [13]),
        [5, 6, 7, 8, 9, 10],
        prompt(config, [14, 15, 16], 1),
    ]
    return ModelInputs(**batch(prompts, side), pixel_values=pixels(config, 7))


@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("side", ["left", "right"])
def test_two_passes_equal_one(fields: dict[str, Any], side: str):
    model = tiny_model(**fields)
    inputs = mixed_batch(model, side)
    with torch.no_grad():
        ours, plain = model.fuse(inputs), fuse_one_pass(model, inputs, visible(model, inputs))
    assert ours.num_frames == plain.num_frames == (1, 2, 3, 0, 1)
    torch.testing.assert_close(ours.inputs_embeds, plain.inputs_embeds, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama", {"attention_bias": True}),
        ("mistral", {"sliding_window": 6}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {}),
    ],
)
def test_two_passes_equal_one_in_every_family(family: str, text: dict[str, Any], kernel: str):
    model = tiny_model(family, text=text)
    model.set_attn_implementation(kernel)
    inputs = mixed_batch(model)
    with torch.no_grad():
        ours, plain = model.fuse(inputs), fuse_one_pass(model, inputs, visible(model, inputs))
    torch.testing.assert_close(ours.inputs_embeds, plain.inputs_embeds, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", SHAPES[:3] + SHAPES[7:9], ids=lambda fields: "-".join(map(str, fields.values())))
def test_two_passes_have_the_gradients_of_one(fields: dict[str, Any]):
    model = tiny_model(**fields)
    inputs = mixed_batch(model)
    weights = torch.randn(model.fuse(inputs).inputs_embeds.shape, generator=torch.Generator().manual_seed(1))
    weights = weights * inputs.attention_mask[..., None]  # type: ignore[index]
    parts = [p for name, p in model.named_parameters() if not name.startswith("language_model.model.layers")]
    gradients = []
    for fused in (model.fuse(inputs), fuse_one_pass(model, inputs, visible(model, inputs))):
        loss = (fused.inputs_embeds * weights).sum()
        gradients.append(torch.autograd.grad(loss, parts, allow_unused=True))
    compared = 0
    for ours, plain in zip(*gradients, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("frames_per_pass", [1, 2, 100])
def test_the_number_of_frames_in_a_pass_changes_nothing(frames_per_pass: int):
    model = tiny_model(reducer_grid=2)
    inputs = mixed_batch(model)
    expected = model.fuse(inputs).inputs_embeds
    model.frames_per_pass = frames_per_pass
    torch.testing.assert_close(model.fuse(inputs).inputs_embeds, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grid", [1, 2])
def test_a_batch_equals_its_prompts_alone(side: str, grid: int):
    model = tiny_model(reducer_grid=grid)
    inputs = mixed_batch(model, side)
    together = model(**vars_of(inputs)).logits
    frame = 0
    for b, length in enumerate(inputs.attention_mask.sum(1).tolist()):  # type: ignore[union-attr]
        keep = inputs.attention_mask[b].bool()  # type: ignore[index]
        ids = inputs.input_ids[b : b + 1, keep]
        count = int((ids == model.config.image_token_id).sum()) // model.config.tokens_per_frame
        frames = inputs.pixel_values[frame : frame + count] if count else None  # type: ignore[index]
        frame += count
        alone = model(input_ids=ids, pixel_values=frames).logits
        assert alone.shape[1] == length
        torch.testing.assert_close(together[b, keep], alone[0], atol=5e-5, rtol=1e-3)


def vars_of(inputs: ModelInputs) -> dict[str, Any]:
    return {name: value for name, value in vars(inputs).items() if value is not None}


def test_streamed_frames_equal_a_tensor_of_them():
    model = tiny_model(reducer_grid=2)
    frames = pixels(model.config, 6)
    whole = ModelInputs(input_ids=torch.tensor([prompt(model.config, [5, 6], 5, [7], 1, [8, 9])]), pixel_values=frames)
    chunks = [
        FrameChunk(pixel_values=frames[:3], slot=0, times=(0.0, 1.0, 2.0)),
        FrameChunk(pixel_values=frames[3:5], slot=0, times=(3.0, 4.0)),
        FrameChunk(pixel_values=frames[5:], slot=1),
    ]
    image = model.config.image_token_id
    ids = torch.tensor([[5, 6, image, 7, image, 8, 9]])
    answers = torch.zeros_like(ids)
    model.frames_per_pass = 2
    streamed = model.fuse(ModelInputs(input_ids=ids, pixel_values=iter(chunks), answer_mask=answers))
    expected = model.fuse(whole)
    assert streamed.num_frames == (6,)
    assert torch.equal(streamed.input_ids, expected.input_ids)
    assert torch.equal(streamed.attention_mask, expected.attention_mask)
    torch.testing.assert_close(streamed.inputs_embeds, expected.inputs_embeds, atol=2e-5, rtol=1e-4)


def test_only_one_chunk_of_streamed_frames_is_alive():
    model, alive, most = tiny_model(), 0, 0

    def chunks():
        nonlocal alive, most
        for _ in range(5):
            frames = pixels(model.config, 2)
            alive += 1
            most = max(most, alive)

            def gone():
                nonlocal alive
                alive -= 1

            weakref.finalize(frames, gone)
            yield FrameChunk(pixel_values=frames, slot=0)
            del frames

    with torch.no_grad():
        model.fuse(ModelInputs(input_ids=torch.tensor([[5, model.config.image_token_id, 6]]), pixel_values=chunks()))
    assert most <= 2  # the one in work, and the next as it is made


def test_text_without_frames_is_not_fused():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    fused = model.fuse(ModelInputs(input_ids=ids))
    torch.testing.assert_close(fused.inputs_embeds, model.get_input_embeddings()(ids))
    torch.testing.assert_close(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


def test_vision_tokens_do_not_see_the_question():
    model = tiny_model(reducer_grid=2)
    tokens = []
    for question in ([7, 8], [9, 10, 11]):
        ids = torch.tensor([prompt(model.config, [5], 1, question)])
        embeds = model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels(model.config, 1))).inputs_embeds
        tokens.append(embeds[0, 1:5])
    assert torch.equal(tokens[0], tokens[1])


def test_a_second_question_reads_stored_keys_and_values():
    model = tiny_model()
    patches, reduced = model.reduce_frames(model.encode_frames(pixels(model.config, 2)))
    first, second = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    kept = model.read(patches, reduced, first).keys_values
    expected = model.read(patches, reduced, second).text
    torch.testing.assert_close(model.read_again(kept, second), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fuse_zero", [True, False])
def test_token_id_zero_is_fused_or_left_plain(fuse_zero: bool):
    model = tiny_model(fuse_token_id_zero=fuse_zero)
    inputs = ModelInputs(
        input_ids=torch.tensor([prompt(model.config, [5, 0], 1, [7, 0, 9])]), pixel_values=pixels(model.config, 1)
    )
    fused = model.fuse(inputs).inputs_embeds[0]
    plain = model.get_input_embeddings()(torch.tensor(0))
    assert torch.allclose(fused[1], plain) == (not fuse_zero)
    torch.testing.assert_close(
        fused, fuse_one_pass(model, inputs, visible(model, inputs)).inputs_embeds[0], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("fuse_answers", "with_labels"), list(itertools.product([True, False], repeat=2)))
def test_answers_with_labels_are_never_fused_and_others_by_choice(fuse_answers: bool, with_labels: bool):
    model = tiny_model(fuse_answers=fuse_answers)
    ids = torch.tensor([prompt(model.config, [5], 1, [7, 20, 21, 9])])
    answers = torch.tensor([[0, 0, 0, 1, 1, 0]])
    labels = torch.where(answers.bool(), ids, -100) if with_labels else None
    inputs = ModelInputs(input_ids=ids, pixel_values=pixels(model.config, 1), answer_mask=answers, labels=labels)
    fused = model.fuse(inputs).inputs_embeds[0]
    plain = model.get_input_embeddings()(ids.clamp(max=63))[0]
    assert torch.allclose(fused[3:5], plain[3:5]) == (with_labels or not fuse_answers)
    if with_labels:
        alike = model.fuse(replace(inputs, answer_mask=None)).inputs_embeds[0]
        torch.testing.assert_close(fused, alike)


def test_vision_tokens_leave_the_reducer_or_prefusion():
    tokens = {}
    for source in ("prefusion", "reducer"):
        model = tiny_model(vision_tokens_from=source)
        frames = pixels(model.config, 1)
        ids = torch.tensor([prompt(model.config, [5], 1, [7])])
        tokens[source] = model.fuse(ModelInputs(input_ids=ids, pixel_values=frames)).inputs_embeds[0, 1]
        reduced = model.reduce_frames(model.encode_frames(frames))[1][0, 0]
        assert torch.allclose(tokens[source], reduced) == (source == "reducer")
    assert not torch.allclose(tokens["prefusion"], tokens["reducer"])


def test_one_query_knows_places_only_with_codes_of_the_patch_grid():
    for codes, knows in (("patch_grid", True), ("resized_query_grid", False)):
        model = tiny_model(position_codes=codes)
        patches = torch.randn(1, 16, 16)
        shuffled = patches[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
        same = torch.allclose(model.reducer(patches).tokens, model.reducer(shuffled).tokens, atol=1e-4)
        assert same != knows


def test_frames_and_places_that_disagree_are_refused():
    model = tiny_model(reducer_grid=2)
    ids = torch.tensor([prompt(model.config, [5], 2, [7])])
    with pytest.raises(ValueError, match="places for 8 vision tokens .* 1 frames of 4 tokens"):
        model(input_ids=ids, pixel_values=pixels(model.config, 1))
    with pytest.raises(ValueError, match="places for 8"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="places for 0"):
        model(input_ids=torch.tensor([[5, 6]]), pixel_values=pixels(model.config, 1))
    with pytest.raises(ValueError, match=r"expected \(frames, 1, 3"):
        model(input_ids=ids, pixel_values=torch.zeros(2, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="pictures of 3 x 8 x 8"):
        model(input_ids=ids, pixel_values=torch.zeros(2, 1, 3, 10, 8))


def test_streams_that_do_not_fit_the_prompt_are_refused():
    model = tiny_model()
    image = model.config.image_token_id
    ids = torch.tensor([[5, image, 7, image]])
    frames = pixels(model.config, 1)
    with pytest.raises(ValueError, match="No frame came for medium 1"):
        model.fuse(ModelInputs(input_ids=ids, pixel_values=[FrameChunk(pixel_values=frames, slot=0)]))
    with pytest.raises(ValueError, match="medium 2"):
        model.fuse(ModelInputs(input_ids=ids, pixel_values=[FrameChunk(pixel_values=frames, slot=2)]))
    with pytest.raises(ValueError, match="a place for each image or video"):
        two = torch.tensor([[5, image, 7, image], [5, image, 7, 8]])
        model.fuse(ModelInputs(input_ids=two, pixel_values=[FrameChunk(pixel_values=frames, slot=0)]))


def test_the_layer_that_is_never_used_is_never_run():
    model = tiny_model()
    layers = model.vision_tower.encoder.layers
    layers[len(layers) - 1] = torch.nn.Module()  # calling it would raise
    assert model.encode_frames(pixels(model.config, 2)).shape == (2, 1, 16, 16)


def test_prefusion_names_the_families_it_knows():
    with pytest.raises(ValueError, match="llama, mistral, qwen2, qwen3, not 'gpt2'"):
        LlavaMiniForConditionalGeneration(tiny_config("gpt2", text={"n_embd": 32}))


def flash_like(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What flash attention computes without a mask: causal, aligned to the last key, with a window."""
    assert attention_mask is None
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    rows, columns = query.shape[2], key.shape[2]
    last = torch.arange(rows)[:, None] + columns - rows
    seen = torch.arange(columns)[None] <= last
    if sliding_window is not None:
        seen &= torch.arange(columns)[None] > last - sliding_window
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


@pytest.mark.parametrize(("family", "text"), [("llama", {}), ("mistral", {"sliding_window": 6})])
def test_a_kernel_like_flash_attention_needs_no_mask(family: str, text: dict[str, Any]):
    AttentionInterface.register("flash_attention_reference", flash_like)
    model = tiny_model(family, text=text)
    inputs = mixed_batch(model)
    expected = model.fuse(inputs).inputs_embeds
    model.config.text._attn_implementation = "flash_attention_reference"
    torch.testing.assert_close(model.fuse(inputs).inputs_embeds, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [0, 2])
def test_no_vision_token_is_as_if_the_places_of_frames_were_not_there(layers: int):
    model = tiny_model(vision_tokens_from="nowhere", reducer="average_pool", prefusion_num_layers=layers)
    inputs = mixed_batch(model, "left")
    with torch.inference_mode():
        fused = model.fuse(inputs)
        assert inputs.attention_mask is not None
        tokens = ("input_ids", "attention_mask", "pixel_values")
        logits = model(**{name: getattr(inputs, name) for name in tokens}).logits
        for row, ids in enumerate(inputs.input_ids):
            real = ids[inputs.attention_mask[row].bool()]
            text = real[real != model.config.image_token_id]
            mine = fused.attention_mask[row].bool()
            assert torch.equal(fused.input_ids[row][mine], text)
            alone = model.language_model(inputs_embeds=fused.inputs_embeds[row][mine][None]).logits[0]
            torch.testing.assert_close(logits[row, -len(text) :], alone, rtol=1e-4, atol=1e-4)


def test_no_vision_token_gives_the_same_prompt_from_a_tensor_and_from_a_stream():
    model = tiny_model(vision_tokens_from="nowhere", reducer="average_pool")
    frames = pixels(model.config, 3)
    with torch.inference_mode():
        whole = model.fuse(
            ModelInputs(input_ids=torch.tensor([prompt(model.config, [5, 6], 3, [7, 8])]), pixel_values=frames)
        )
        chunks = [FrameChunk(pixel_values=frames[:2], slot=0), FrameChunk(pixel_values=frames[2:], slot=0)]
        ids = torch.tensor([prompt(model.config, [5, 6], 1, [7, 8])])
        streamed = model.fuse(ModelInputs(input_ids=ids, pixel_values=chunks))
    assert whole.input_ids.tolist() == streamed.input_ids.tolist() == [[5, 6, 7, 8]]
    torch.testing.assert_close(whole.inputs_embeds, streamed.inputs_embeds)


def test_what_is_generated_begins_with_the_ids_that_were_given():
    model = tiny_model(vision_tokens_from="nowhere", reducer="average_pool")
    tensors = batch([prompt(model.config, [5, 6], 1, [7, 8]), prompt(model.config, [5, 6], 2, [7])], "left")
    given = {"pixel_values": pixels(model.config, 3), "max_new_tokens": 3, "min_new_tokens": 3}
    ids = model.generate(**tensors, **given)
    told = model.generate(**tensors, **given, return_dict_in_generate=True)
    assert isinstance(ids, torch.Tensor)
    assert torch.equal(ids[:, : tensors["input_ids"].shape[1]], tensors["input_ids"])
    assert ids.shape[1] == tensors["input_ids"].shape[1] + 3
    assert torch.equal(told["sequences"], ids)
