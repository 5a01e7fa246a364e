"""Generation, loss, precision and checkpointing through transformers' own machinery."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from llava_mini.flow import ModelInputs
from tests.model.one_pass import fuse_one_pass
from tests.model.test_fuse import mixed_batch, vars_of, visible
from tests.tiny_models import IMAGE_TOKEN, batch, gradients_of, pixels, prompt, tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def one_image(model: Any) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([prompt(model.config, [5, 6], 1, [7, 8])]),
        "pixel_values": pixels(model.config, 1),
    }


def greedy_by_hand(model: Any, inputs: ModelInputs, steps: int) -> torch.Tensor:
    """Greedy continuation without any cache: the fused prompt, then plain embeddings of the answer."""
    embeds = fuse_one_pass(model, inputs, visible(model, inputs)).inputs_embeds
    new: list[int] = []
    for _ in range(steps):
        new.append(int(model.language_model(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[new[-1]]]))], dim=1)
    return torch.tensor([new])


@pytest.mark.parametrize("cache", [None, "static", "dynamic object", "static object"])
def test_greedy_generation_equals_the_form_without_cache(cache: str | None):
    model = tiny_model()
    inputs = one_image(model)
    kwargs: dict[str, Any] = {}
    if cache == "static":
        kwargs["cache_implementation"] = "static"
    elif cache == "dynamic object":
        kwargs["past_key_values"] = DynamicCache(config=model.config.text)
    elif cache == "static object":
        kwargs["past_key_values"] = StaticCache(config=model.config.text, max_cache_len=32)
    output = model.generate(**inputs, **GREEDY, **kwargs)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(output[:, :length], inputs["input_ids"])
    assert torch.equal(output[:, length:], greedy_by_hand(model, ModelInputs(**inputs), 6))


def test_a_left_padded_batch_generates_what_its_prompts_do_alone():
    model = tiny_model()
    inputs = mixed_batch(model, "left")
    together = model.generate(**vars_of(inputs), **GREEDY)[:, inputs.input_ids.shape[1] :]
    frame = 0
    for b in range(len(together)):
        ids = inputs.input_ids[b : b + 1, inputs.attention_mask[b].bool()]  # type: ignore[index]
        count = int((ids == IMAGE_TOKEN).sum())
        frames = inputs.pixel_values[frame : frame + count] if count else None  # type: ignore[index]
        frame += count
        alone = model.generate(input_ids=ids, pixel_values=frames, **GREEDY)[:, ids.shape[1] :]
        assert torch.equal(together[b], alone[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=["beams", "sampling", "penalties"],
)
def test_every_way_of_decoding_returns_the_prompt_and_real_tokens(options: dict[str, Any]):
    model = tiny_model()
    inputs = one_image(model)
    torch.manual_seed(0)
    output: Any = model.generate(**inputs, **{**GREEDY, **options}, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    assert output.sequences.shape == (options.get("num_return_sequences", 1), length + 6)
    assert (output.sequences[:, :length] == inputs["input_ids"]).all()
    assert (output.sequences[:, length:] < IMAGE_TOKEN).all()


def test_a_penalty_for_repetition_looks_at_the_prompt():
    model = tiny_model()
    inputs = one_image(model)
    best = model.generate(**inputs, **GREEDY)[0, -6:]
    inputs["input_ids"] = torch.tensor([prompt(model.config, [int(best[0])], 1, [7, 8])])
    first = int(model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1})[0, -1])
    inputs["input_ids"] = torch.tensor([prompt(model.config, [first], 1, [7, 8])])
    penalised = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1}, repetition_penalty=1e6)
    assert int(penalised[0, -1]) not in (first, 7, 8)


def test_a_streamer_receives_each_token():
    model = tiny_model()

    class Collect(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer, inputs = Collect(), one_image(model)
    output = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert streamer.seen[-6:] == output[0, -6:].tolist()


def test_only_the_last_position_gets_logits_at_prefill():
    model, shapes = tiny_model(), []
    model.language_model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(output.shape[1]))
    model.generate(**one_image(model), **GREEDY)
    assert shapes == [1] * 6


def test_fused_prompts_can_be_generated_from_and_trained_on():
    model = tiny_model()
    inputs = one_image(model)
    fused = model.fuse(ModelInputs(**inputs))
    answers: list[Any] = [model.generate(fused=fused, **GREEDY), model.generate(**inputs, **GREEDY)]
    assert torch.equal(*answers)
    labels = torch.tensor([[-100, -100, -100, 7, 8]])
    fused = model.fuse(ModelInputs(**inputs, labels=labels))
    ours = model(**inputs, labels=labels).loss
    plain = model.language_model(inputs_embeds=fused.inputs_embeds, labels=fused.labels).loss
    torch.testing.assert_close(ours, plain)


def test_a_cache_from_an_earlier_turn_is_refused():
    model = tiny_model()
    inputs = one_image(model)
    cache = DynamicCache(config=model.config.text)
    model.generate(**inputs, **GREEDY, past_key_values=cache)
    with pytest.raises(ValueError, match="pass the whole conversation"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    with pytest.raises(ValueError, match="pass the whole conversation"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="one of the two"):
        model.generate()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool):
    model = tiny_model(reducer_grid=2).train()
    inputs = vars_of(mixed_batch(model))
    plain = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(name.startswith("prefusion") for name in plain)
    torch.testing.assert_close(gradients_of(model, inputs), plain)


def test_gradients_reach_every_part_of_image_and_video():
    model = tiny_model()
    for count in (1, 3):
        model.zero_grad()
        ids = torch.tensor([prompt(model.config, [5, 6], count, [7, 8, 9])])
        labels = torch.where(ids == 9, ids, -100)
        model(input_ids=ids, pixel_values=pixels(model.config, count), labels=labels).loss.backward()
        unused = ("vision_tower.encoder.layers.2", "vision_tower.post_layernorm")
        missing = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(unused)]
        assert missing == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_single(dtype: torch.dtype):
    model = tiny_model()
    inputs = vars_of(mixed_batch(model))
    expected = model(**inputs).logits
    half = torch.nn.Module.to(tiny_model(), dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    logits = half(**inputs).logits
    assert logits.dtype == dtype
    mask = inputs["attention_mask"].bool()
    similarity = torch.cosine_similarity(logits[mask].float(), expected[mask], dim=-1)
    assert similarity.min() > 0.98


def test_a_float32_tower_feeds_a_bfloat16_rest():
    model: Any = torch.nn.Module.to(tiny_model(), torch.bfloat16)
    model.vision_tower.float()
    logits = model(**one_image(model)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_changing_the_attention_kernel_reaches_prefusion():
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert model.prefusion is not None
    layers: Any = model.prefusion.layers
    assert all(layer.config._attn_implementation == "eager" for layer in layers)
    model.config.text._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="not 'flex_attention'"):
        model.fuse(ModelInputs(**one_image(model)))


def test_right_padding_gives_the_same_loss_as_left():
    model = tiny_model()
    losses = []
    for side in ("left", "right"):
        prompts = [prompt(model.config, [5], 1, [7, 8, 9]), prompt(model.config, [5, 6, 4, 4], 2, [8, 9, 9])]
        inputs = batch(prompts, side)
        labels = torch.where(inputs["input_ids"] == 9, 9, -100)
        losses.append(model(**inputs, pixel_values=pixels(model.config, 3), labels=labels).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_prefusion_can_start_from_the_language_models_first_layers():
    model = tiny_model()
    assert model.prefusion is not None
    model.prefusion.copy_from(model.language_model.model.layers)
    pairs: Any = zip(model.prefusion.layers, model.language_model.model.layers, strict=False)
    for ours, theirs in pairs:
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.block.state_dict()[name], value)


@pytest.mark.parametrize("case", ["image only", "all labelled", "all answers"])
def test_a_prompt_without_text_to_fuse_still_answers(case: str):
    model = tiny_model()
    ids = torch.tensor([prompt(model.config, 1) if case == "image only" else prompt(model.config, [5], 1, [7])])
    inputs: dict[str, Any] = {"input_ids": ids, "pixel_values": pixels(model.config, 1)}
    if case == "all labelled":
        inputs["labels"] = ids.clone()
    elif case == "all answers":
        inputs["answer_mask"] = torch.ones_like(ids)
    assert model(**inputs).logits.isfinite().all()


def test_labels_in_the_places_of_frames_teach_nothing():
    model = tiny_model()
    inputs = one_image(model)
    labels = inputs["input_ids"].clone()
    expected = model(**inputs, labels=labels.masked_fill(labels == IMAGE_TOKEN, -100)).loss
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_the_table_never_grows_over_the_image_token():
    model = tiny_model(image_token_id=IMAGE_TOKEN + 8)
    with pytest.raises(ValueError, match="would make a word of image_token_id 72"):
        model.resize_token_embeddings(73)
    assert model.resize_token_embeddings(72).weight.shape[0] == 72


def test_assisted_decoding_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        model.generate(**one_image(model), **GREEDY, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(**one_image(model), **GREEDY, assistant_model=model.language_model)


def test_ids_that_are_no_batch_are_refused():
    model = tiny_model()
    for ids in (torch.tensor([5, 6]), torch.empty(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="input_ids have the shape"):
            model(input_ids=ids)


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_head_reads_rows_that_lie_side_by_side(prompts):
    model, seen = tiny_model(), []
    head = model.language_model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.arange(3, 9).repeat(prompts, 1)
    logits = model(input_ids=ids, logits_to_keep=1).logits
    (rows,) = seen
    assert rows.shape == (prompts, 1, model.config.text.hidden_size)
    assert rows.stride() == (rows.shape[2], rows.shape[2], 1)
    torch.testing.assert_close(logits, model(input_ids=ids).logits[:, -1:])
