"""Adapters with a base: ``mm_projector.bin``, LoRA with ``non_lora_trainables.bin``, and PEFT's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.checkpoint.adapters import LowRank
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.from_original import rename
from tests.checkpoint.folders import (
    FIXTURES,
    RELEASED,
    assert_same_tensors,
    copy_released,
    edit_json,
    released_tensors,
    stored_tensors,
    write_tensors,
)
from tests.tiny_models import tiny_model

FORMATS = json.loads((FIXTURES / "adapter_formats.json").read_text())
RANK = 4


def random_tensors(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapter_folder(folder: Path) -> Path:
    """An empty adapter that has a released configuration."""
    folder.mkdir()
    for name in ("config.json", "vision_config.json"):
        (folder / name).write_text((RELEASED / name).read_text())
    return folder


def language_model_folder(folder: Path) -> Path:
    """The released model's language model alone, as a base."""
    parts = ("model.embed_tokens", "model.layers", "model.norm", "lm_head")
    copy_released(folder, {key: value for key, value in released_tensors().items() if key.startswith(parts)})
    edit_json(folder / "config.json", model_type="llama", mm_vision_tower="")
    return folder


def tower_folder(folder: Path) -> Path:
    tower: Any = LlavaMiniForConditionalGeneration.from_pretrained(RELEASED).vision_tower
    tower.save_pretrained(folder)
    return folder


def test_a_projector_file_replaces_the_tensors_of_its_base(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    changed = random_tensors(FORMATS["mm_projector_bin_final"])
    assert len(changed) == 50
    torch.save({name: value.half() for name, value in changed.items()}, adapter / "mm_projector.bin")
    convert(adapter, tmp_path / "ours", base=RELEASED)
    expected = {**released_tensors(), **{name: value.half() for name, value in changed.items()}}
    assert_same_tensors(stored_tensors(tmp_path / "ours"), {rename(name): value for name, value in expected.items()})


def test_a_projector_file_completes_a_plain_language_model(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    changed = random_tensors(FORMATS["mm_projector_bin_final"])
    torch.save(changed, adapter / "mm_projector.bin")
    base, tower = language_model_folder(tmp_path / "base"), tower_folder(tmp_path / "clip")
    convert(adapter, tmp_path / "ours", base=base, vision_tower=tower)
    expected = {**released_tensors(), **changed}
    assert_same_tensors(stored_tensors(tmp_path / "ours"), {rename(name): value for name, value in expected.items()})


def test_an_adapter_without_a_base_or_with_an_incomplete_one_is_refused(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    changed = random_tensors(FORMATS["mm_projector_bin_final"])
    torch.save({k: v for k, v in changed.items() if "compressor" not in k}, adapter / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"holds an adapter and no model. Give the folder of the model"):
        convert(adapter, tmp_path / "ours")
    base, tower = language_model_folder(tmp_path / "base"), tower_folder(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"missing: 10 \(reducer"):
        convert(adapter, tmp_path / "ours", base=base, vision_tower=tower)
    (adapter / "config.json").unlink()
    with pytest.raises(ValueError, match="plain language model"):
        convert(adapter, tmp_path / "ours", base=base, vision_tower=tower)


def lora_tensors(targets: list[str]) -> dict[str, Tensor]:
    """A LoRA as LLaVA's trainer saves it, for these weights of the released model."""
    shapes = {}
    for target in targets:
        rows, columns = released_tensors()[target].shape
        stem = f"base_model.model.{target.removesuffix('.weight')}"
        shapes[f"{stem}.lora_A.weight"] = [RANK, columns]
        shapes[f"{stem}.lora_B.weight"] = [rows, RANK]
    return random_tensors(shapes)


@pytest.mark.parametrize("entry", ["lora_base_with_compressor", "lora_base_without_compressor"])
def test_a_lora_with_its_other_trained_tensors_is_merged(tmp_path, entry):
    touches_prefusion = FORMATS[entry]["lora_touches_prefusion"]
    places = ("model.layers.", "model.prefusion_layers.") if touches_prefusion else ("model.layers.",)
    names = tuple(f"{name}.weight" for name in FORMATS["lora_target_names"])
    targets = [name for name in released_tensors() if name.startswith(places) and name.endswith(names)]
    lora = lora_tensors(targets)
    assert len(lora) == FORMATS[entry]["lora_key_count"]

    adapter = adapter_folder(tmp_path / "adapter")
    trained = random_tensors(FORMATS[entry]["non_lora_trainables"])
    torch.save(trained, adapter / "non_lora_trainables.bin")
    torch.save(lora, adapter / "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": str(RELEASED)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    convert(adapter, tmp_path / "ours")

    expected = {**released_tensors(), **{k.removeprefix("base_model.model."): v for k, v in trained.items()}}
    for target in targets:
        stem = f"base_model.model.{target.removesuffix('.weight')}"
        expected[target] = expected[target] + 2 * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    stored = stored_tensors(tmp_path / "ours")
    assert stored.keys() == {rename(name) for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(stored[rename(name)], value)


def test_a_bfloat16_weight_is_updated_in_float32_and_keeps_its_dtype():
    weight, down, up = torch.ones(4, 4).bfloat16(), torch.full((1, 4), 2**-6), torch.full((4, 1), 2**-6)
    updated = LowRank(down, up, 64).add_to(weight)
    assert updated.dtype == torch.bfloat16
    assert torch.equal(updated.float(), torch.full((4, 4), 1 + 2**-6))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_that_peft_trained_on_our_model_is_merged_as_peft_does(tmp_path, use_rslora):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=r"language_model\..*(q_proj|down_proj)|prefusion\..*v_proj",
        modules_to_save=["projector"],
        use_rslora=use_rslora,
    )
    wrapped = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "ours", base=tmp_path / "base")

    base = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    ours = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert ours.keys() == merged.state_dict().keys()
    assert any(not torch.equal(ours[name], value) for name, value in tiny_model().state_dict().items())
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(ours[name], value)


def test_an_adapter_folder_loads_through_transformers(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=r"language_model\..*q_proj"))
    wrapped.save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(trained) == 6
    parameters = dict(loaded.named_parameters())
    for name, value in trained.items():
        ours = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(parameters[ours], value)


def test_a_lora_for_another_model_is_refused(tmp_path):
    adapter = adapter_folder(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8}))
    stray = {f"base_model.model.model.layers.9.mlp.up_proj.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(stray, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"updates 1 tensors that its base .* does not have \(language_model"):
        convert(adapter, tmp_path / "ours", base=RELEASED)
    stray.popitem()
    save_file(stray, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="only one of two matrices"):
        convert(adapter, tmp_path / "ours", base=RELEASED)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"peft_type": "IA3"}, {"alpha_pattern": {"q_proj": 3}}])
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, settings):
    adapter = adapter_folder(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": RANK, **settings}))
    write_tensors(adapter, {"x": torch.zeros(1)})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{next(iter({**settings, 'IA3': 1}))}|IA3"):
        convert(adapter, tmp_path / "ours", base=RELEASED)


def test_a_base_for_a_whole_model_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is a whole model"):
        convert("tiny", tmp_path / "out", base="tiny")
    assert not (tmp_path / "out").exists()
