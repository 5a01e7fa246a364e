"""``from_pretrained`` and ``save_pretrained``: the released layout and ours, strictly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.checkpoint.from_original import rename
from tests.checkpoint.folders import (
    FIXTURES,
    RELEASED,
    TOWER,
    assert_same_tensors,
    copy_released,
    edit_json,
    released_tensors,
    stored_tensors,
    write_tensors,
)
from tests.tiny_models import pixels, tiny_model

CLASSES = [LlavaMiniForConditionalGeneration, AutoModelForImageTextToText]
MODELS = sorted(path for path in (FIXTURES / "models").iterdir() if not (path / "recipe.json").exists())


def test_there_are_parity_models():
    assert len(MODELS) >= 3


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_released_folder_loads_every_tensor(folder, cls):
    model = cls.from_pretrained(folder)
    assert type(model) is LlavaMiniForConditionalGeneration
    assert not model.training
    assert_same_tensors(model.state_dict(), {rename(key): value for key, value in released_tensors(folder).items()})


def test_a_released_config_is_read_as_ours():
    concrete, auto = LlavaMiniConfig.from_pretrained(RELEASED), AutoConfig.from_pretrained(RELEASED)
    assert type(auto) is type(concrete) is LlavaMiniConfig
    assert (auto.vision.hidden_size, auto.vision.patch_size) == (32, 7)
    assert auto.prefusion_num_layers == 4
    assert not auto.fuse_token_id_zero
    assert auto.fuse_answers


def test_tower_sizes_come_from_a_known_name(tmp_path):
    shutil.copyfile(RELEASED / "config.json", tmp_path / "config.json")
    edit_json(tmp_path / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert AutoConfig.from_pretrained(tmp_path).vision.hidden_size == 1024


def test_tower_sizes_come_from_a_neighbouring_folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    shutil.copyfile(RELEASED / "config.json", model / "config.json")
    edit_json(model / "config.json", mm_vision_tower="someone/small-clip")
    (tmp_path / "small-clip").mkdir()
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    (tmp_path / "small-clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes}))
    assert LlavaMiniConfig.from_pretrained(model).vision.patch_size == 2


def test_an_unknown_tower_is_an_error_that_lists_the_known_ones(tmp_path):
    shutil.copyfile(RELEASED / "config.json", tmp_path / "config.json")
    edit_json(tmp_path / "config.json", mm_vision_tower="someone/other-tower")
    with pytest.raises(ValueError, match=r"someone/other-tower.*openai/clip-vit-large-patch14-336"):
        AutoConfig.from_pretrained(tmp_path)


def test_shards_with_an_index_load(tmp_path):
    folder = copy_released(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_tensors(folder, released_tensors(), num_shards=3)
    model = LlavaMiniForConditionalGeneration.from_pretrained(folder)
    assert_same_tensors(model.state_dict(), {rename(key): value for key, value in released_tensors().items()})


def test_a_float32_tower_beside_bfloat16_loads_in_the_dtype_of_the_config(tmp_path):
    tensors = {key: value if TOWER in key else value.bfloat16() for key, value in released_tensors().items()}
    folder = copy_released(tmp_path / "model", tensors)
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    assert {value.dtype for value in AutoModelForImageTextToText.from_pretrained(folder).parameters()} == {
        torch.bfloat16
    }
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert_same_tensors(model.state_dict(), {rename(key): value.float() for key, value in tensors.items()})


def write_tower(folder: Path) -> None:
    """The released model's tower as a CLIP folder."""
    sizes = CLIPVisionConfig(**json.loads((RELEASED / "vision_config.json").read_text()))
    tower = CLIPVisionModel(sizes)
    tower.load_state_dict({k.removeprefix(TOWER): v for k, v in released_tensors().items() if TOWER in k})
    tower.save_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_absent_tower_is_read_from_the_folder_that_the_config_names(tmp_path, cls):
    folder = copy_released(tmp_path / "model", {k: v for k, v in released_tensors().items() if TOWER not in k})
    edit_json(folder / "config.json", mm_vision_tower="clip")
    write_tower(tmp_path / "clip")
    assert_same_tensors(cls.from_pretrained(folder).state_dict(), cls.from_pretrained(RELEASED).state_dict())


def test_an_absent_tower_that_is_nowhere_is_an_error_that_says_what_to_do(tmp_path):
    folder = copy_released(tmp_path / "model", {k: v for k, v in released_tensors().items() if TOWER not in k})
    with pytest.raises(ValueError, match=r"holds no vision tower.*Put the CLIP model's folder beside"):
        LlavaMiniForConditionalGeneration.from_pretrained(folder)
    edit_json(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")
    edit_json(folder / "config.json", vision_config=json.loads((RELEASED / "vision_config.json").read_text()))
    with pytest.raises(ValueError, match=r"cannot be read.*Put the CLIP model's folder beside"):
        LlavaMiniForConditionalGeneration.from_pretrained(folder, local_files_only=True)


def test_a_state_dict_without_a_tower_is_refused():
    model = tiny_model()
    bare = {key: value for key, value in model.state_dict().items() if not key.startswith("vision_tower.")}
    with pytest.raises(ValueError, match="state dict holds no vision tower"):
        LlavaMiniForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=bare)


def test_a_tower_that_does_not_fit_is_an_error(tmp_path):
    folder = copy_released(tmp_path / "model", {k: v for k, v in released_tensors().items() if TOWER not in k})
    edit_json(folder / "config.json", mm_vision_tower="clip")
    edit_json(folder / "config.json", vision_config=json.loads((RELEASED / "vision_config.json").read_text()))
    CLIPVisionModel(CLIPVisionConfig(**_sizes(hidden_size=16))).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"'.*clip' does not fit.*of another shape"):
        LlavaMiniForConditionalGeneration.from_pretrained(folder)


def _sizes(**changed: int) -> dict[str, Any]:
    return {**json.loads((RELEASED / "vision_config.json").read_text()), **changed}


def break_by(kind: str, tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    match kind:
        case "missing":
            return {key: value for key, value in tensors.items() if key != name}
        case "unexpected":
            return {**tensors, "stray.weight": torch.zeros(1)}
        case _:
            return {**tensors, name: torch.zeros(3)}


BREAKAGES = [
    ("missing", r"missing: 1 \(projector.linear_1.bias\)"),
    ("unexpected", r"unexpected: 1 \(stray.weight\)"),
    ("misshapen", r"of another shape: 1 \(projector.linear_1.bias \[3\] instead of \[64\]\)"),
]


@pytest.mark.parametrize(("kind", "message"), BREAKAGES)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("layout", ["ours", "released"])
def test_tensors_that_do_not_fit_are_listed_and_refused(tmp_path, kind, message, cls, layout):
    if layout == "ours":
        folder = tmp_path / "ours"
        LlavaMiniForConditionalGeneration.from_pretrained(RELEASED).save_pretrained(folder)
        write_tensors(folder, break_by(kind, stored_tensors(folder), "projector.linear_1.bias"))
    else:
        folder = copy_released(tmp_path / "model", break_by(kind, released_tensors(), "model.mm_projector.0.bias"))
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(folder)


def test_many_missing_tensors_are_counted_and_the_first_listed(tmp_path):
    tensors = {key: value for key, value in released_tensors().items() if "prefusion" not in key}
    with pytest.raises(ValueError, match=r"missing: 36 \((prefusion\S+, ){10}\.\.\.\)"):
        LlavaMiniForConditionalGeneration.from_pretrained(copy_released(tmp_path / "model", tensors))


def test_constants_that_old_checkpoints_store_are_ignored(tmp_path):
    legacy = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        f"{TOWER}embeddings.position_ids": torch.zeros(1, 17),
    }
    folder = copy_released(tmp_path / "model", {**released_tensors(), **legacy})
    model = LlavaMiniForConditionalGeneration.from_pretrained(folder)
    assert_same_tensors(model.state_dict(), {rename(key): value for key, value in released_tensors().items()})


@pytest.mark.parametrize("cls", CLASSES)
def test_a_released_model_is_saved_in_our_layout_and_comes_back(tmp_path, cls):
    model = cls.from_pretrained(RELEASED)
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava_mini"
    again = cls.from_pretrained(tmp_path)
    assert_same_tensors(again.state_dict(), model.state_dict())
    frames = pixels(model.config, 2)
    ids = torch.tensor([[1, model.config.image_token_id, 5, model.config.image_token_id, 6]])
    torch.testing.assert_close(again(ids, frames).logits, model(ids, frames).logits, rtol=0, atol=0)


def test_the_released_layout_can_be_asked_for(tmp_path):
    model = LlavaMiniForConditionalGeneration.from_pretrained(RELEASED)
    model.save_pretrained(tmp_path, save_original_format=True)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), released_tensors())
    assert_same_tensors(LlavaMiniForConditionalGeneration.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_comes_back_with_and_without_tied_embeddings(tmp_path, family, tied):
    model = tiny_model(family, text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    assert ("language_model.lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_tensors(again.state_dict(), model.state_dict())
    shared = again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert shared == tied


@pytest.mark.parametrize("reducer", ["identity", "average_pool", "query"])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_every_kind_of_model_comes_back(tmp_path, reducer, num_layers):
    model = tiny_model(reducer=reducer, prefusion_num_layers=num_layers)
    model.save_pretrained(tmp_path)
    assert_same_tensors(AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict(), model.state_dict())
