"""Methods that act inside the language model equal their plainest form, in batches, families and ways of decoding."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llava_mini.flow import ModelInputs
from llava_mini.inference import torch_backend
from llava_mini.inference.engine import Engine
from llava_mini.inference.settings import NO_CACHING, Request
from llava_mini.model.inside import Inside
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import REDUCERS
from tests.model.inside_by_hand import METHODS, expected, inside_model
from tests.model.reducers.test_contract import METHODS as CONTRACT
from tests.model.test_fuse import vars_of
from tests.tiny_engine import picture, tiny_parts, write_film
from tests.tiny_models import batch, gradients_of, pixels, prompt, tiny_model

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
DROPPING = [name for name in METHODS if REDUCERS[name].drops_inside]

every_method = pytest.mark.parametrize("method", METHODS)


def mixed(model: LlavaMiniForConditionalGeneration, side: str = "left") -> ModelInputs:
    """An image, two images, an image after the text, a film, and text alone."""
    rows = [
        prompt(model.config, [5, 6], 1, [7, 8, 9]),
        prompt(model.config, [5], 1, [4], 1, [9, 10, 11, 12]),
        prompt(model.config, [14, 15, 16], 1),
        prompt(model.config, 3, [13]),
        [5, 6, 7, 8],
    ]
    return ModelInputs(**batch(rows, side), pixel_values=pixels(model.config, 7))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def test_every_reducer_that_acts_inside_is_tested_here():
    assert set(METHODS) == {name for name, reducer in REDUCERS.items() if reducer.acts_inside}


@every_method
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_batch_reads_what_the_plain_form_reads_prompt_by_prompt(method: str, kernel: str, side: str):
    model = inside_model(method)
    model.set_attn_implementation(kernel)
    inputs = mixed(model, side)
    fused, logits = model.fuse(inputs), model(**vars_of(inputs)).logits
    for row in range(len(logits)):
        plain = expected(model, fused, row)
        close(logits[row][fused.attention_mask[row].bool()][plain.stays], plain.logits[plain.stays])


@every_method
@pytest.mark.parametrize(
    ("family", "text"),
    [("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {}), ("llama", {"num_hidden_layers": 5})],
)
@torch.inference_mode()
def test_every_family_reads_what_the_plain_form_reads(method: str, family: str, text: dict[str, Any]):
    model = inside_model(method, family, text=text, reducer_layer=1)
    fused = model.fuse(
        ModelInputs(
            input_ids=torch.tensor([prompt(model.config, [5], 2, [7, 8])]), pixel_values=pixels(model.config, 2)
        )
    )
    plain = expected(model, fused, 0)
    close(
        model(inputs_embeds=fused.inputs_embeds, **model.inside(fused)).logits[0, plain.stays],
        plain.logits[plain.stays],
    )


@every_method
@pytest.mark.parametrize("cache", [None, "no cache", "static", "dynamic object", "static object"])
@torch.inference_mode()
def test_a_batch_answers_what_the_plain_form_answers_prompt_by_prompt(method: str, cache: str | None):
    model = inside_model(method)
    fused = model.fuse(mixed(model))
    arguments: dict[str, Any] = {}
    if cache == "no cache":
        arguments["use_cache"] = False
    elif cache == "static":
        arguments["cache_implementation"] = "static"
    elif cache == "dynamic object":
        arguments["past_key_values"] = DynamicCache(config=model.config.text)
    elif cache == "static object":
        arguments["past_key_values"] = StaticCache(config=model.config.text, max_cache_len=128)
    output = model.generate(fused=fused, **GREEDY, **arguments)
    assert isinstance(output, torch.Tensor)
    for row in range(len(output)):
        assert torch.equal(output[row, -5:], expected(model, fused, row, 5).answer)


@every_method
@torch.inference_mode()
def test_a_prompt_without_padding_answers_what_the_plain_form_answers(method: str):
    model = inside_model(method)
    ids = torch.tensor([prompt(model.config, [5, 6], 2, [7, 8, 9])])
    inputs = {"input_ids": ids, "pixel_values": pixels(model.config, 2)}
    output = model.generate(**inputs, **GREEDY)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output[0, -5:], expected(model, model.fuse(ModelInputs(**inputs)), 0, 5).answer)


@every_method
@torch.inference_mode()
def test_beams_score_an_answer_as_the_plain_form_does(method: str):
    model = inside_model(method)
    fused = model.fuse(mixed(model))
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    output: Any = model.generate(fused=fused, **{**GREEDY, **options})
    length = fused.input_ids.shape[1]
    for index, sequence in enumerate(output.sequences):
        row = index // 2
        answer = sequence[length:]
        mask = fused.attention_mask[row].bool()
        embeds = torch.cat([fused.inputs_embeds[row, mask], model.get_input_embeddings()(answer)])[None]
        logits = _teacher_forced(model, fused, row, embeds)
        score = logits.log_softmax(-1).gather(1, answer[:, None]).sum() / len(answer)
        close(score, output.sequences_scores[index])


def _teacher_forced(
    model: LlavaMiniForConditionalGeneration, fused: Any, row: int, embeds: torch.Tensor
) -> torch.Tensor:
    """Logits that predict an answer which stands after one prompt of a batch, without any cache."""
    mask = fused.attention_mask[row].bool()
    one = type(fused)(
        inputs_embeds=fused.inputs_embeds[row : row + 1, mask],
        attention_mask=fused.attention_mask[row : row + 1, mask],
        input_ids=fused.input_ids[row : row + 1, mask],
        is_fused=fused.is_fused[row : row + 1, mask],
        num_frames=fused.num_frames[row : row + 1],
    )
    length = one.input_ids.shape[1]
    return model(inputs_embeds=embeds, **model.inside(one)).logits[0, length - 1 : -1]


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_recomputed_activations(method: str, reentrant: bool):
    model = inside_model(method).train()
    inputs = vars_of(mixed(model, "right"))
    plain = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert {name for name, _ in model.named_parameters() if name.startswith("reducer.")} <= plain.keys()
    torch.testing.assert_close(gradients_of(model, inputs), plain)


@every_method
@torch.inference_mode()
def test_a_saved_model_answers_as_before(method: str, tmp_path: Any):
    model = inside_model(method)
    fused = model.fuse(mixed(model))
    model.save_pretrained(tmp_path)
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path).eval()
    output, same = model.generate(fused=fused, **GREEDY), again.generate(fused=fused, **GREEDY)
    assert isinstance(output, torch.Tensor)
    assert torch.equal(output, same)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", DROPPING)
@torch.inference_mode()
def test_later_layers_keep_keys_of_fewer_rows(method: str):
    model = inside_model(method)
    ids = torch.tensor([prompt(model.config, [5, 6], 2, [7, 8, 9])])
    cache = DynamicCache(config=model.config.text)
    model(input_ids=ids, pixel_values=pixels(model.config, 2), past_key_values=cache)
    kept = REDUCERS[method].cost(model.config, 0).later_tokens
    assert kept is not None
    assert [layer.get_seq_length() for layer in cache.layers] == [37, 37, 5 + 2 * kept]


@every_method
@torch.inference_mode()
def test_the_engine_answers_what_one_that_keeps_nothing_answers(method: str, tmp_path: Any, monkeypatch: Any):
    monkeypatch.setattr(torch_backend, "PREFILL_TOKENS", 7)
    parts = tiny_parts(fields={"reducer": method, "prefusion_num_layers": 0, **METHODS[method][0]})
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    film = write_film(tmp_path / "film.mp4")
    media: list[list[Any]] = [[picture(1)], [film], [picture(1), film]]
    for question in ("One?", "What is this?", "One?"):
        for some in media:
            assert engine.ask(question, some, max_tokens=5).text == plain.ask(question, some, max_tokens=5).text
    together = engine.ask_batch([Request(question="One?", media=some) for some in media], max_tokens=5)
    assert [answer.text for answer in together] == [plain.ask("One?", some, max_tokens=5).text for some in media]
    again = engine.ask("One?", media[0], max_tokens=5).stats
    assert again.cached_frames == 1
    assert (again.cached_tokens > 0) != REDUCERS[method].drops_inside


@every_method
def test_a_language_model_that_knows_nothing_of_the_prompts_is_refused(method: str):
    model = inside_model(method)
    with pytest.raises(ValueError, match="hand on what model.inside"):
        model.language_model(inputs_embeds=torch.zeros(1, 4, 32))


@every_method
def test_a_kernel_without_masks_is_refused(method: str):
    model = inside_model(method)
    model.config.text._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no such mask"):
        model(input_ids=torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prefusion_num_layers": 1}, "no pre-fusion can come"),
        ({"family": "mistral", "text": {"sliding_window": 8}}, "no sliding window; got 'mistral'"),
        (
            {"family": "qwen2", "text": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}},
            "no sliding window; got 'qwen2'",
        ),
    ],
)
@every_method
def test_what_no_method_can_act_in_is_refused(method: str, fields: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        inside_model(method, **fields)


@pytest.mark.parametrize("method", DROPPING)
def test_rows_are_dropped_before_the_last_layer(method: str):
    with pytest.raises(ValueError, match="after layer 3 of a language model that has 3"):
        inside_model(method, reducer_layer=3)


@pytest.mark.parametrize("method", DROPPING)
@torch.inference_mode()
def test_a_prompt_in_pieces_is_refused_where_rows_are_dropped_by_the_whole(method: str):
    model = inside_model(method)
    ids = torch.tensor([prompt(model.config, [5, 6], 1, [7, 8, 9])])
    fused = model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels(model.config, 1)))
    with pytest.raises(ValueError, match="The first 4 of 21 rows"):
        model(inputs_embeds=fused.inputs_embeds[:, :4], **model.inside(fused))
    cache = DynamicCache(config=model.config.text)
    model(inputs_embeds=fused.inputs_embeds, past_key_values=cache, **model.inside(fused))
    with pytest.raises(ValueError, match="Leave past_key_values out"):
        model(inputs_embeds=fused.inputs_embeds[:, -1:], past_key_values=cache, **model.inside(fused))


@pytest.mark.parametrize("reducer", sorted(set(REDUCERS) - set(METHODS)))
def test_other_reducers_tell_the_language_model_nothing(reducer: str):
    model = tiny_model(**CONTRACT[reducer])
    assert model.inside(model.fuse(ModelInputs(input_ids=torch.tensor([[5, 6]])))) == {}


@every_method
def test_a_prompt_without_frames_is_left_alone(method: str):
    model = inside_model(method)
    fused = model.fuse(ModelInputs(input_ids=torch.tensor([[5, 6]])))
    assert type(model.inside(fused)["inside"]) is Inside
