"""Damaged folders and impossible requests: one sentence that names the cause."""

import shutil
from pathlib import Path

import pytest
import torch

from llava_mini import Engine, LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.checkpoint.locate import locate
from tests.tiny_models import pixels, prompt, tiny_model

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "examples" / "media" / "clip.mp4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    return Path(shutil.copytree(locate("tiny"), tmp_path / "model"))


def test_weights_that_were_cut_off_are_named(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"The weights in .* are damaged .* interrupted"):
        LlavaMiniForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(ValueError, match="are damaged"):
        Engine.load(str(folder))


@pytest.mark.parametrize(("content", "match"), [("[]", "holds a list"), ("{", "is not JSON")])
def test_a_damaged_configuration_is_named(folder: Path, content: str, match: str):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json' {match}"):
        Engine.load(str(folder))


def test_a_damaged_or_absent_tokenizer_is_named(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        LlavaMiniProcessor.from_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        LlavaMiniProcessor.from_pretrained(folder)


def test_text_that_is_not_unicode_is_refused():
    engine = Engine.load()
    with pytest.raises(ValueError, match="not UTF-8"):
        engine.ask("\udcff what", CLIP)
    with pytest.raises(ValueError, match="not UTF-8"):
        engine.processor(text="\ud800")
    with pytest.raises(ValueError, match="unknown key 'bold'"):
        engine.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "a", "bold": True}]}], tokenize=True
        )


def test_more_frames_than_the_context_holds_are_refused_before_any_is_read():
    engine = Engine.load()
    read: list[int] = []
    with pytest.raises(ValueError, match=r"at least 100\d+ tokens .* holds 4096"):
        next(engine.stream("What moves?", CLIP, num_frames=100_000, progress=lambda *numbers: read.append(numbers)))
    assert read == []


def test_generate_refuses_a_prompt_beyond_the_context():
    model = tiny_model(text={"max_position_embeddings": 8})
    inputs = {
        "input_ids": torch.tensor([prompt(model.config, [5, 6, 7, 8], 4)]),
        "pixel_values": pixels(model.config, 4),
    }
    with pytest.raises(ValueError, match="prompt has 8 tokens, but the model's context holds 8"):
        model.generate(**inputs, max_new_tokens=1)


def test_a_preset_is_not_taken_for_weights():
    with pytest.raises(ValueError, match="sizes of a model, not weights"):
        Engine.load("llava-v1.5-7b")
