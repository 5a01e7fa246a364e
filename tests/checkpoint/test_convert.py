"""``convert``: every layout becomes ours, tensor for tensor, or nothing is written."""

import errno
import filecmp
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from llava_mini.checkpoint import convert as module
from llava_mini.checkpoint import tensors as tensors_module
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.from_original import rename
from llava_mini.checkpoint.source import expected_tensors
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
from tests.checkpoint.test_from_pretrained import BREAKAGES, MODELS, break_by, write_tower
from tests.tiny_models import tiny_model


def assert_same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    _, differing, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not differing
    assert not errors


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_a_released_model_becomes_ours_and_computes_the_same(tmp_path, folder):
    convert(folder, tmp_path / "ours")
    expected = LlavaMiniForConditionalGeneration.from_pretrained(folder)
    assert_same_tensors(load_file(tmp_path / "ours" / "model.safetensors"), expected.state_dict())
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert_same_tensors(again.state_dict(), expected.state_dict())
    assert again.config.to_diff_dict() == {**expected.config.to_diff_dict(), **_written_by_saving(again.config)}


def _written_by_saving(config: LlavaMiniConfig) -> dict[str, object]:
    return {key: value for key, value in config.to_diff_dict().items() if key in {"architectures", "_name_or_path"}}


def test_dtypes_of_the_source_are_kept_bit_for_bit(tmp_path):
    tensors = {key: value if TOWER in key else value.bfloat16() for key, value in released_tensors().items()}
    convert(copy_released(tmp_path / "model", tensors), tmp_path / "ours")
    stored = stored_tensors(tmp_path / "ours")
    assert_same_tensors(stored, {rename(key): value for key, value in tensors.items()})
    assert {value.dtype for key, value in stored.items() if key.startswith("vision_tower.")} == {torch.float32}
    assert {value.dtype for key, value in stored.items() if not key.startswith("vision_tower.")} == {torch.bfloat16}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_read_and_written(tmp_path):
    folder = copy_released(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_tensors(folder, released_tensors(), num_shards=3)
    convert(folder, tmp_path / "ours", max_shard_size="300KB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) >= 4
    expected = LlavaMiniForConditionalGeneration.from_pretrained(RELEASED)
    assert_same_tensors(stored_tensors(tmp_path / "ours"), expected.state_dict())
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert_same_tensors(again.state_dict(), expected.state_dict())


def test_pytorch_files_are_read(tmp_path):
    folder = copy_released(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(released_tensors(), folder / "pytorch_model.bin")
    convert(folder, tmp_path / "ours")
    convert(RELEASED, tmp_path / "expected")
    assert_same_tensors(stored_tensors(tmp_path / "ours"), stored_tensors(tmp_path / "expected"))


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("was-executed"),))


def test_code_in_pytorch_files_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy_released(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
        convert(folder, tmp_path / "ours")
    assert not Path("was-executed").exists()


def test_converting_twice_changes_nothing(tmp_path):
    convert(RELEASED, tmp_path / "once", max_shard_size="300KB")
    convert(tmp_path / "once", tmp_path / "twice", max_shard_size="300KB")
    assert_same_files(tmp_path / "once", tmp_path / "twice")


def test_our_folders_are_copied_with_everything_beside_the_weights(tmp_path):
    model = tiny_model(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    convert(tmp_path / "model", tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "a card"
    assert_same_tensors(stored_tensors(tmp_path / "copy"), stored_tensors(tmp_path / "model"))
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "copy")
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_an_absent_tower_is_read_from_its_folder(tmp_path):
    write_tower(tmp_path / "clip")
    bare = {key: value for key, value in released_tensors().items() if TOWER not in key}
    named = copy_released(tmp_path / "named", bare)
    edit_json(named / "config.json", mm_vision_tower="clip")
    unnamed = copy_released(tmp_path / "unnamed", bare)
    convert(named, tmp_path / "ours")
    convert(unnamed, tmp_path / "given", vision_tower=tmp_path / "clip")
    expected = LlavaMiniForConditionalGeneration.from_pretrained(RELEASED).state_dict()
    assert_same_tensors(stored_tensors(tmp_path / "ours"), expected)
    assert_same_tensors(stored_tensors(tmp_path / "given"), expected)
    with pytest.raises(ValueError, match=r"holds no vision tower.*vision_tower"):
        convert(unnamed, tmp_path / "nothing")


def test_generation_settings_are_copied_or_made_from_the_stop_ids(tmp_path):
    folder = copy_released(tmp_path / "model")
    edit_json(folder / "config.json", bos_token_id=512, eos_token_id=[521, 513])
    convert(folder, tmp_path / "made")
    made = GenerationConfig.from_pretrained(tmp_path / "made")
    assert (made.bos_token_id, made.eos_token_id) == (512, [513, 521])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    convert(folder, tmp_path / "copied")
    assert GenerationConfig.from_pretrained(tmp_path / "copied").eos_token_id == 7


@pytest.mark.parametrize(("kind", "message"), BREAKAGES)
@pytest.mark.parametrize("layout", ["ours", "released"])
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_written(tmp_path, kind, message, layout):
    if layout == "ours":
        convert(RELEASED, tmp_path / "source")
        write_tensors(
            tmp_path / "source", break_by(kind, stored_tensors(tmp_path / "source"), "projector.linear_1.bias")
        )
    else:
        copy_released(tmp_path / "source", break_by(kind, released_tensors(), "model.mm_projector.0.bias"))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_full_size_names_and_shapes_are_those_of_the_preset_model():
    stored = json.loads((FIXTURES / "checkpoint_keys_llama_3_1_8b.json").read_text())
    listed = {**stored["tensors"], **stored["vision_tower_tensors"]}
    assert len(listed) == 732
    released = {
        "model_type": "llava_mini_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        **{key: value for key, value in stored["config_used"].items() if key != "vision"},
    }
    expected = expected_tensors(LlavaMiniConfig.from_dict(released))
    assert {name: list(value.shape) for name, value in expected.items()} == {
        rename(name): shape for name, shape in listed.items()
    }
    assert sum(value.numel() for value in expected.values()) == (
        stored["parameter_count"] + stored["vision_tower_parameter_count"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "llava_next"}, r"type 'llava_next', which convert does not know. It knows llava_mini,"),
        ({"model_type": "llama"}, "plain language model.*base of an adapter"),
        ({}, "type ''"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, content, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "model", tmp_path / "ours")


def test_a_folder_without_model_config_or_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no model '.*absent'.*Known models: tiny"):
        convert(tmp_path / "absent", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config.json' cannot be read"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a list instead of named values"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        convert(tmp_path / "empty", tmp_path / "ours")
    shutil.copyfile(RELEASED / "config.json", tmp_path / "empty" / "config.json")
    shutil.copyfile(RELEASED / "vision_config.json", tmp_path / "empty" / "vision_config.json")
    with pytest.raises(ValueError, match="holds no weights"):
        convert(tmp_path / "empty", tmp_path / "ours")


def test_an_impossible_configuration_is_refused(tmp_path):
    folder = copy_released(tmp_path / "model")
    edit_json(folder / "config.json", num_attention_heads=5)
    with pytest.raises(ValueError, match=r"config.json of .* is not valid: .*not a multiple"):
        convert(folder, tmp_path / "ours")


def test_absent_and_damaged_shards_are_named(tmp_path):
    folder = copy_released(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    write_tensors(folder, released_tensors(), num_shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors' cannot be read as a file of tensors"):
        convert(folder, tmp_path / "ours")
    shard.unlink()
    with pytest.raises(ValueError, match=r"2 shards, of which model-00002-of-00002.safetensors are absent"):
        convert(folder, tmp_path / "ours")


def test_an_existing_destination_is_refused_and_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "note").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        convert(RELEASED, tmp_path / "ours")
    assert (tmp_path / "ours" / "note").read_text() == "mine"


def test_a_destination_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .Not a directory"):
        convert(RELEASED, tmp_path / "file" / "ours")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match=r"cannot be written .Permission denied.*may you write there"):
        convert(RELEASED, tmp_path / "ours")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"needs 0.07 GB of disk, but 0.00 GB are free"):
        convert(RELEASED, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors_module, "save_file", fill)
    with pytest.raises(ValueError, match=r"cannot be written .No space left on device"):
        convert(RELEASED, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing_and_the_next_run_starts_anew(tmp_path, monkeypatch):
    save, num_saved = tensors_module.save_file, []

    def interrupt(*arguments: Any, **named: Any) -> None:
        if num_saved:
            raise KeyboardInterrupt
        num_saved.append(1)
        save(*arguments, **named)

    monkeypatch.setattr(tensors_module, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(RELEASED, tmp_path / "ours", max_shard_size="300KB")
    assert num_saved
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    left = tmp_path / ".ours.incomplete"  # by a run that was killed
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_text("half")
    convert(RELEASED, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert len(stored_tensors(tmp_path / "ours")) == len(released_tensors())


def test_written_files_have_the_rights_of_any_other_file(tmp_path):
    convert(RELEASED, tmp_path / "ours")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
