"""Costs computed from a configuration equal those that torch counts and those that the paper prints."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, DynamicCache

from llava_mini.config import CLIP_VIT_L_336, LlavaMiniConfig, preset
from llava_mini.flow import ModelInputs
from llava_mini.model import cost
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import REDUCERS
from tests.tiny_models import batch, pixels, prompt, tiny_config

ROTATION = 1e-3
"""What the angles of rotary positions may add: some versions of transformers make them by a matrix product."""

WIDE = CLIPVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=2
)
"""A tower with room for 16 heads wider than 1, which torch would not multiply as matrices."""

VARIANTS: list[dict[str, Any]] = [
    {},
    {"reducer_grid": 2, "position_codes": "resized_query_grid"},
    {"vision_tokens_from": "reducer"},
    {"reducer": "average_pool", "reducer_grid": 2},
    {"reducer": "average_pool", "vision_tokens_from": "nowhere"},
    {"reducer": "identity"},
    {"reducer": "identity", "prefusion_num_layers": 0},
    {"prefusion_num_layers": 0},
    {"prefusion_num_layers": 1, "resolution_ratio": 2, "reducer_grid": 4},
    {"reducer": "mqt", "reducer_tokens": 1, "prefusion_num_layers": 0, "vision_config": WIDE},
    {"reducer": "mqt", "reducer_tokens": 4, "prefusion_num_layers": 0, "resolution_ratio": 2, "vision_config": WIDE},
    {"reducer": "token_packer", "reducer_grid": 2},
    {"reducer": "token_packer", "reducer_grid": 1, "prefusion_num_layers": 0},
    {"reducer": "m3", "reducer_grid": 2, "prefusion_num_layers": 0},
    {"reducer": "quecc", "reducer_grid": 1, "prefusion_num_layers": 0},
    {"reducer": "llama_vid", "reducer_grid": 2, "prefusion_num_layers": 0, "vision_config": WIDE},
    {"reducer": "visionzip", "reducer_tokens": 13},
    {"reducer": "visionzip", "reducer_tokens": 13, "prefusion_num_layers": 0, "resolution_ratio": 2},
    {"reducer": "divprune", "reducer_tokens": 5},
    {"reducer": "divprune", "reducer_tokens": 5, "prefusion_num_layers": 0, "resolution_ratio": 2},
]

RAGGED: list[dict[str, Any]] = [
    {"reducer": "prumerge", "prefusion_num_layers": 0},
    {"reducer": "prumerge_plus", "prefusion_num_layers": 0, "resolution_ratio": 2},
]
"""Where the number of tokens depends on what a frame shows."""

ASKED = 4
"""Words after the first frame in what is counted."""


def reads_question(fields: dict[str, Any]) -> bool:
    return REDUCERS[fields.get("reducer", "query")].reads_question


def vicuna(**fields: Any) -> LlavaMiniConfig:
    return LlavaMiniConfig(text_config=preset("llava-mini-vicuna-7b").text, **fields)


@pytest.mark.parametrize(
    ("fields", "printed"),
    [
        ({"reducer": "identity", "prefusion_num_layers": 0}, 8.55),
        ({"reducer": "identity", "prefusion_num_layers": 0, "resolution_ratio": 2}, 40.49),
        ({"prefusion_num_layers": 0}, 0.96),
        ({"prefusion_num_layers": 0, "reducer_grid": 4}, 1.16),
        ({"prefusion_num_layers": 0, "reducer_grid": 8}, 1.79),
        ({"prefusion_num_layers": 0, "reducer_grid": 12}, 2.85),
        ({"prefusion_num_layers": 1}, 1.21),
        ({"prefusion_num_layers": 2}, 1.46),
        ({"prefusion_num_layers": 4}, 1.96),
        ({"prefusion_num_layers": 4, "reducer": "average_pool"}, 1.96),
        ({"prefusion_num_layers": 4, "reducer_grid": 2}, 2.01),
        ({"prefusion_num_layers": 4, "resolution_ratio": 2, "reducer_grid": 8}, 8.13),
    ],
)
def test_the_papers_counting_gives_the_papers_totals(fields, printed):
    assert round(cost.paper_flops(vicuna(**fields)).total / 1e12, 2) == printed


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"reducer": "mqt", "reducer_tokens": 256}, 4.31),
        ({"reducer": "mqt", "reducer_tokens": 36}, 1.40),
        ({"reducer": "mqt", "reducer_tokens": 2}, 0.95),
        ({"reducer": "token_packer", "reducer_grid": 12}, 2.84),
        ({"reducer": "token_packer", "reducer_grid": 8}, 1.78),
        ({"reducer": "token_packer", "reducer_grid": 6}, 1.41),
        ({"reducer": "m3"}, 0.955),
        ({"reducer": "quecc"}, 1.15),
    ],
)
def test_the_papers_counting_gives_what_is_known_of_other_methods(fields, known):
    total = cost.paper_flops(vicuna(prefusion_num_layers=0, **fields)).total / 1e12
    assert total == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"reducer": "identity"}, 7.83),
        ({"reducer": "voco", "reducer_tokens": 2}, 7.86),
        ({"reducer": "mqt", "reducer_tokens": 256}, 3.67),
        ({"reducer": "mqt", "reducer_tokens": 36}, 0.82),
        ({"reducer": "mqt", "reducer_tokens": 2}, 0.38),
        ({"reducer": "prumerge_plus"}, 2.23),
        ({"reducer": "prumerge"}, 0.78),
        ({"reducer": "token_packer", "reducer_grid": 12}, 2.24),
        ({"reducer": "token_packer", "reducer_grid": 8}, 1.20),
        ({"reducer": "token_packer", "reducer_grid": 6}, 0.83),
        ({"reducer": "query", "prefusion_num_layers": 4}, 1.39),
        ({"reducer": "quecc"}, 0.58),
        ({"reducer": "query"}, 0.39),
        ({"reducer": "m3"}, 0.39),
    ],
)
def test_one_more_frame_of_a_video_costs_what_is_known_without_words_made_of_its_tokens(fields, known):
    config = vicuna(**{"prefusion_num_layers": 0, **fields})
    one, two = (cost.paper_flops(config, num_frames=frames).total for frames in (1, 2))
    head = 2 * config.text.hidden_size * config.text.vocab_size * cost.tokens_of_frame(config)  # at every position
    assert (two - one - head) / 1e12 == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "tokens", "total"),
    [
        ({"reducer": "prumerge"}, 33, 1.36),
        ({"reducer": "prumerge_plus"}, 145, 2.84),
        ({"reducer": "visionzip", "reducer_tokens": 64}, 64, 1.77),
        ({"reducer": "divprune", "reducer_tokens": 56}, 56, 1.68),
    ],
)
def test_methods_without_training_are_counted_with_their_published_tokens(fields, tokens, total):
    config = vicuna(prefusion_num_layers=0, **fields)
    assert cost.tokens_of_frame(config) == tokens
    assert round(cost.paper_flops(config).total / 1e12, 2) == total
    assert cost.paper_flops(config) == cost.paper_flops(config, num_vision_tokens=tokens)


@pytest.mark.parametrize(("pixels_of_a_side", "tower", "total"), [(336, 1.14, 1.76), (224, 0.51, 1.12)])
def test_llama_vid_with_the_tower_of_its_authors_costs_what_is_known_of_it(pixels_of_a_side, tower, total):
    eva = CLIPVisionConfig(  # EVA-ViT-g without its last layer, which is not run
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=39,
        num_attention_heads=16,
        image_size=pixels_of_a_side,
        patch_size=14,
    )
    clip = CLIPVisionConfig(**{**CLIP_VIT_L_336, "image_size": pixels_of_a_side})
    ours = cost.paper_flops(vicuna(reducer="llama_vid", prefusion_num_layers=0, vision_config=clip))
    theirs = cost.paper_flops(vicuna(vision_config=eva)).vision_tower
    assert round(theirs / 1e12, 2) == tower
    assert (ours.total - ours.vision_tower + theirs) / 1e12 == pytest.approx(total, abs=0.01)


def test_misprints_of_the_paper_are_what_the_docstring_says():
    three_layers = cost.paper_flops(vicuna(prefusion_num_layers=3)).total
    whole = cost.paper_flops(preset("llava-mini-vicuna-7b"))
    assert round(three_layers / 1e12, 2) == 1.71
    assert round(whole.prefusion / 1e12, 2) == 1.00
    assert round(whole.language_model / 1e12, 2) == 0.58
    assert round(whole.vision_tower / 1e12, 3) == 0.349


def test_query_reducer_costs_what_table_8_says():
    assert round(cost.paper_flops(vicuna()).reducer / 1e9, 2) == 2.42
    assert round(cost.paper_flops(vicuna(reducer_grid=2)).reducer / 1e9, 2) == 2.44


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_flops_equal_those_of_a_counted_forward(fields, num_frames):
    config = tiny_config(attn_implementation="eager", **fields)
    computed = cost.flops(config, num_frames=num_frames, num_text_tokens=11, num_question_tokens=ASKED).as_dict()
    assert counted(config, num_frames, 11) == pytest.approx(computed, rel=ROTATION)


@pytest.mark.parametrize("fields", RAGGED)
@pytest.mark.parametrize("num_frames", [0, 1, 3])
def test_flops_with_the_tokens_that_there_are_equal_those_of_a_counted_forward(fields, num_frames):
    config = tiny_config(attn_implementation="eager", **fields)
    tokens = num_tokens(config, num_frames)
    computed = cost.flops(config, num_frames=num_frames, num_text_tokens=11, num_vision_tokens=tokens).as_dict()
    assert counted(config, num_frames, 11) == pytest.approx(computed, rel=ROTATION)
    assert tokens < num_frames * config.tokens_per_frame or not num_frames


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_flops_of_other_families_equal_those_of_a_counted_forward(family):
    config = tiny_config(family, attn_implementation="eager")
    computed = cost.flops(config, num_frames=2, num_text_tokens=7).as_dict()
    assert counted(config, 2, 7) == pytest.approx(computed, rel=ROTATION)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("fields", VARIANTS + RAGGED)
def test_parameters_equal_those_of_the_model(family, fields):
    assert stored(config := tiny_config(family, **fields)) == cost.parameters(config).as_dict()


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
    ],
)
def test_parameters_follow_biases_and_tied_tables(family, text):
    assert stored(config := tiny_config(family, text=text)) == cost.parameters(config).as_dict()


def test_released_8b_model_has_its_published_parameters():
    count = cost.parameters(preset("llava-mini-llama-3.1-8b"))
    assert count.total - count.vision_tower == 8_927_893_504
    assert count.vision_tower == 303_507_456


def test_bytes_follow_the_number_format():
    config = preset("llava-mini-vicuna-7b")
    assert cost.weight_bytes(config, "float32").total == 2 * cost.weight_bytes(config, "bfloat16").total
    assert cost.keys_values_bytes_per_token(config, "float16") == 2 * 32 * 4096 * 2
    assert cost.prefusion_bytes_per_frame(config, "float16") == 4 * 577 * 2 * 4096 * 2


@pytest.mark.parametrize("fields", [one for one in VARIANTS if not reads_question(one)])
@pytest.mark.parametrize(("num_frames", "num_kept"), [(1, 0), (1, 4), (3, 4)])
def test_flops_of_a_later_question_equal_those_of_a_counted_run(fields, num_frames, num_kept):
    config = tiny_config(attn_implementation="eager", **fields)
    computed = cost.later_question_flops(
        config, num_frames=num_frames, num_text_tokens=11 - num_kept, num_kept_tokens=num_kept
    )
    assert (computed.vision_tower, computed.reducer, computed.projector) == (0, 0, 0)
    counts = counted_later(config, num_frames, num_kept, 11)
    assert counts == pytest.approx((computed.prefusion, computed.language_model), rel=0.01)


@pytest.mark.parametrize("fields", [one for one in VARIANTS if reads_question(one)])
def test_flops_of_a_later_question_include_tokens_that_depend_on_it(fields):
    config, kept, words = tiny_config(attn_implementation="eager", **fields), 4, 7
    computed = cost.later_question_flops(config, num_frames=3, num_text_tokens=words, num_kept_tokens=kept)
    model = LlavaMiniForConditionalGeneration(config).eval()
    inputs = ModelInputs(**batch([prompt(config, [5] * kept, 3, [5] * words)]))
    with torch.no_grad():
        _, seen = model.reduce_frames(model.encode_frames(pixels(config, 3)))
        cache = model.language_model(input_ids=inputs.input_ids[:, :kept], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            text = model.text_rows(inputs)
            tokens = model.frame_tokens(seen, text, torch.zeros(3, dtype=torch.long)).tokens
            rows = torch.cat([tokens.flatten(0, 1)[None], text.embeds[:, -words:]], dim=1)
            model.language_model(inputs_embeds=rows, past_key_values=cache, logits_to_keep=1)
    assert counter.get_total_flops() == pytest.approx(computed.total, rel=0.01)
    assert min(computed.reducer, computed.projector, computed.language_model) > 0


@pytest.mark.parametrize("fields", RAGGED)
def test_a_later_question_reduces_frames_of_unequal_numbers_again(fields):
    config = tiny_config(attn_implementation="eager", **fields)
    model = LlavaMiniForConditionalGeneration(config).eval()
    inputs = ModelInputs(**batch([prompt(config, [5] * 11, 3)]))
    with torch.no_grad():
        _, vision = model.reduce_frames(model.encode_frames(pixels(config, 3)))
        text = model.text_rows(inputs)
        with FlopCounterMode(display=False) as counter:
            tokens = model.frame_tokens(vision, text, torch.zeros(3, dtype=torch.long))
    assert tokens.valid is not None
    most, fewer = (
        cost.later_question_flops(config, num_frames=3, num_text_tokens=11, num_vision_tokens=given)
        for given in (3 * config.tokens_per_frame, int(tokens.valid.sum()))
    )
    assert most.reducer + most.projector == counter.get_total_flops()
    assert (fewer.reducer, fewer.projector) == (most.reducer, most.projector)
    assert fewer.language_model < most.language_model


def test_a_number_of_vision_tokens_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="is 6, but with the reducer 'prumerge' a frame has 1 to 5, and there are 1"):
        cost.flops(tiny_config(**RAGGED[0]), num_vision_tokens=6)
    with pytest.raises(ValueError, match="is 2, but with the reducer 'query' a frame has 1, and there are 1"):
        cost.paper_flops(tiny_config(), num_vision_tokens=2)


def test_a_later_question_costs_what_the_goal_says_before_the_language_model():
    config = preset("llava-mini-vicuna-7b")
    assert round(cost.later_question_flops(config).prefusion / 1e12, 3) == 0.071
    short = cost.later_question_flops(config, num_text_tokens=12, num_kept_tokens=31)
    assert round(short.prefusion / 1e12, 3) == 0.020


@pytest.mark.parametrize(("words", "kept"), [(0, 4), (5, -1)])
def test_a_later_question_without_words_is_refused(words, kept):
    with pytest.raises(ValueError, match=f"got {words} after {kept}"):
        cost.later_question_flops(tiny_config(), num_text_tokens=words, num_kept_tokens=kept)


def test_unknown_number_format_lists_the_known_ones():
    with pytest.raises(ValueError, match="'float8'.*bfloat16"):
        cost.weight_bytes(tiny_config(), "float8")


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="0 frames and 0 text tokens"):
        cost.flops(tiny_config(), num_frames=0, num_text_tokens=0)


def counted(config: LlavaMiniConfig, num_frames: int, num_text_tokens: int) -> dict[str, int]:
    """What torch counts in one forward, by part."""
    torch.manual_seed(0)
    model = LlavaMiniForConditionalGeneration(config).eval()
    inputs = batch([prompt(config, [5] * (num_text_tokens - ASKED), num_frames, [5] * ASKED)])
    images = pixels(config, num_frames) if num_frames else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, pixel_values=images, logits_to_keep=1)
    by_name = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    by_module = {name.rpartition(".")[2]: count for name, count in by_name.items() if name.count(".") == 1}
    counts = {name: by_module.get(name, 0) for name in cost.flops(config).as_dict()}
    # It reads a question alone without its head, which is no call of the whole part.
    inner = [f"LlavaMiniForConditionalGeneration.language_model.{part}" for part in ("model", "lm_head")]
    counts["language_model"] = sum(by_name[name] for name in inner)
    # The tower's layers are called one by one, so what they count belongs to no part.
    return {**counts, "vision_tower": by_name["Global"] - sum(counts.values())}


def num_tokens(config: LlavaMiniConfig, num_frames: int) -> int:
    """Vision tokens in the prompt of ``counted``."""
    torch.manual_seed(0)
    model = LlavaMiniForConditionalGeneration(config).eval()
    inputs = ModelInputs(**batch([prompt(config, [5], num_frames)]), pixel_values=pixels(config, num_frames))
    with torch.no_grad():
        return int((model.fuse(inputs).input_ids == config.image_token_id).sum()) if num_frames else 0


def counted_later(config: LlavaMiniConfig, num_frames: int, num_kept: int, num_text_tokens: int) -> tuple[int, int]:
    """What torch counts in pre-fusion and in the language model when all before a question is kept."""
    model = LlavaMiniForConditionalGeneration(config).eval()
    text = model.get_input_embeddings()(torch.full((num_frames, num_text_tokens), 5))
    kept, question = text[:, :num_kept], text[:, num_kept:]
    with torch.no_grad():
        patches, reduced = model.reduce_frames(model.encode_frames(pixels(config, num_frames)))
        keys_values = ()
        if model.prefusion is not None:
            passes = config.reducer != "identity" and config.vision_tokens_from == "prefusion"
            rows = [patches, reduced, kept] if passes else [patches, kept]
            keys_values = model.prefusion(torch.cat(rows, dim=1)).keys_values
        tokens = reduced[:, : cost.tokens_of_frame(config)]
        prefix = torch.cat([kept[0], tokens.flatten(0, 1)])[None]
        cache = DynamicCache()
        if prefix.shape[1]:
            model.language_model(inputs_embeds=prefix, past_key_values=cache)
        with FlopCounterMode(display=False) as before:
            fused = model.read_again(keys_values, question)
        with FlopCounterMode(display=False) as after:
            model.language_model(inputs_embeds=fused.mean(0)[None], past_key_values=cache, logits_to_keep=1)
    return before.get_total_flops(), after.get_total_flops()


def stored(config: LlavaMiniConfig) -> dict[str, int]:
    """Parameters that the model has, by part."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    parts = dict(model.named_children())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert set(counts) <= set(cost.parameters(config).as_dict())
    return {name: counts.get(name, 0) for name in cost.parameters(config).as_dict()}
