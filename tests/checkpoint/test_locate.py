"""What a model's name means."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from llava_mini.checkpoint import locate as module
from llava_mini.checkpoint.locate import locate


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert locate(tmp_path) == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("runs/one") == Path("runs/one")


def test_the_embedded_model_is_a_folder_of_the_package():
    assert locate("tiny") == Path(module.__file__).parents[1] / "assets" / "tiny"


@pytest.mark.parametrize("name", ["tinny", "llava-mini", "a/b/c", "", "/no/such/folder"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"There is no model .*Known models: tiny, ICTNLP/llava-mini-llama-3.1-8b"):
        locate(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="is a file. Give the folder"):
        locate(tmp_path / "model.safetensors")


def test_a_hub_name_without_network_suggests_a_folder(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'someone/some-model' is not a folder here, and cannot be downloaded.*folder"
    ):
        locate("someone/some-model")


def test_a_hub_name_is_downloaded_without_pickles_unless_there_is_nothing_else(tmp_path, monkeypatch):
    asked = []

    def download(name: str, **patterns: list[str]) -> str:
        asked.append((name, patterns))
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", download)
    assert locate("someone/some-model") == tmp_path
    assert [sorted(patterns) for _, patterns in asked] == [["ignore_patterns"], ["allow_patterns"]]
    assert "*.bin" in asked[0][1]["ignore_patterns"]
    asked.clear()
    (tmp_path / "model.safetensors").write_text("")
    locate("someone/some-model")
    assert len(asked) == 1
