"""The shapes in docs/how_it_works.md are those of the models that it names."""

import re
from pathlib import Path

import pytest
import torch

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.flow import ModelInputs
from llava_mini.model.cost import flops
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

PAGE = Path(__file__).parents[1] / "docs" / "how_it_works.md"
NUM_WORDS = 43


def table(heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its head."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    first = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert first, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in first[0].splitlines()[2:]]


def shapes(config: LlavaMiniConfig) -> dict[str, tuple[int, ...]]:
    """What the steps of the page give, on a device that computes shapes and no numbers."""
    with torch.device("meta"), torch.no_grad():
        model = LlavaMiniForConditionalGeneration(config).eval()
        pixels = torch.empty(1, config.views_per_frame, 3, config.image_size, config.image_size)
        features = model.encode_frames(pixels)
        patches, reduced = model.reduce_frames(features)
        text = torch.empty(1, NUM_WORDS, config.text.hidden_size)
        fused = model.read(patches, reduced, text)
        assert patches is not None
        assert fused.vision is not None
        assert fused.text is not None
        assert len(fused.keys_values) == config.prefusion_num_layers
        prompt = torch.cat([fused.text, fused.vision], dim=1)
        return {
            "pixels": pixels.shape,
            "features of the vision tower": features.shape,
            "tokens of the reducer": model.reducer(features[:, 0]).tokens.shape,
            "projected patches": patches.shape,
            "projected tokens": reduced.shape,
            "vision rows of pre-fusion": torch.cat([patches, reduced], dim=1).shape,
            "their keys in each layer, and their values": fused.keys_values[0][0].shape,
            "text rows of pre-fusion": text.shape,
            "vision tokens that leave it": fused.vision.shape,
            "fused text, mean over the frames": fused.text.shape,
            "the fused prompt": prompt.shape,
            "logits": model.language_model(inputs_embeds=prompt).logits.shape,
        }


@pytest.mark.parametrize(("column", "name"), [(2, "tiny"), (3, "llava-mini-llama-3.1-8b")])
def test_the_table_of_shapes_is_that_of_the_models(column: int, name: str):
    printed = {row[0]: tuple(map(int, row[column].split(","))) for row in table("The shapes")}
    assert printed == shapes(preset(name))


def test_a_prompt_on_the_page_is_as_long_as_fuse_makes_it():
    config = preset("tiny")
    model = LlavaMiniForConditionalGeneration(config)
    ids = torch.tensor([[5, config.image_token_id, *range(6, 5 + NUM_WORDS)]])
    fused = model.fuse(ModelInputs(input_ids=ids, pixel_values=torch.zeros(1, 1, 3, 96, 96)))
    printed = next(row[2] for row in table("The shapes") if row[0] == "the fused prompt")
    assert printed == ", ".join(map(str, fused.inputs_embeds.shape))


@pytest.mark.parametrize(
    ("column", "name"), [(2, "tiny"), (3, "llava-mini-llama-3.1-8b"), (4, "llava-mini-hd-vicuna-7b")]
)
def test_the_alphabet_has_the_sizes_of_the_configurations(column: int, name: str):
    config = preset(name)
    printed = {row[0]: int(row[column]) for row in table("The alphabet")}
    assert printed == {
        "B": 1,
        "F": 1,
        "V": config.views_per_frame,
        "P": config.patches_per_frame,
        "Q": config.tokens_per_frame,
        "E": config.vision.hidden_size,
        "D": config.text.hidden_size,
    }


def test_the_operations_on_the_page_are_those_of_the_cost_model():
    config = preset("llava-mini-llama-3.1-8b")
    unasked, asked = (flops(config, num_text_tokens=count) for count in (0, NUM_WORDS))
    once, question = ([row[i] for row in table("Why vision never sees the question")] for i in (1, 2))
    assert once == [giga(unasked.vision_tower + unasked.reducer + unasked.projector), giga(unasked.prefusion), ""]
    assert question == ["", giga(asked.prefusion - unasked.prefusion), giga(asked.language_model)]


def giga(operations: int) -> str:
    return f"{operations / 1e9:.0f} GFLOP"
