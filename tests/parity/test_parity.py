"""The shipped choice of parity fixtures is reproduced, and every file of it is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.parity import cases, check, preprocess
from tests.parity.result import Result

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = {"llama_c1": 16, "vicuna_c2": 1, "llama_hd_c4": 1}


def assert_reproduced(results: list[Result], at_least: int) -> None:
    assert len(results) >= at_least
    wrong = [result for result in results if not result.error <= result.tolerance]
    assert wrong == []


@pytest.mark.parametrize(("name", "number"), MODELS.items())
def test_every_case_of_a_model_is_reproduced(name: str, number: int):
    model = cases.load_model(FIXTURES / "models" / name)
    about = json.loads((FIXTURES / "models" / name / "meta.json").read_text())
    tokenizer = FIXTURES / "tokenizers" / about["tokenizer"]
    paths = sorted((FIXTURES / "cases").glob(f"{name}__*.json"))
    assert len(paths) == number
    for path in paths:
        assert_reproduced(cases.check_case(cases.read_case(path, model), model, tokenizer), at_least=4)


def test_preprocessing_is_reproduced():
    assert_reproduced(list(preprocess.check(FIXTURES)), at_least=50)


def test_full_size_names_and_adapter_formats_are_ours():
    (keys,) = FIXTURES.glob("checkpoint_keys_*.json")
    adapters = json.loads((FIXTURES / "adapter_formats.json").read_text())
    assert_reproduced([check.check_keys(keys), *check.check_adapters(adapters, FIXTURES)], at_least=5)


def test_tensors_given_by_a_formula_are_those_of_whole_numbers():
    seed, scale, mask = 3813647466, 0.17142857611179352, (1 << 64) - 1
    expected = []
    for index in range(1, 7):
        z = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        expected.append((2 * ((z >> 40) / 2**24) - 1) * scale)
    torch.testing.assert_close(cases.formula(seed, [2, 3], scale), torch.tensor(expected).view(2, 3))


def test_a_wrong_number_is_seen():
    model = cases.load_model(FIXTURES / "models" / "llama_c1")
    case = cases.read_case(FIXTURES / "cases" / "llama_c1__image_b1.json", model)
    case.tensors["out/logits"] += 1e-3
    case.tensors["out/unknown"] = case.tensors["out/logits"]
    results = cases.check_case(case, model, FIXTURES / "tokenizers" / "llama3_tiny")
    wrong = [result.name.split("/", 1)[1] for result in results if not result.error <= result.tolerance]
    assert wrong == ["out/logits", "out/logits", "coverage"]


def test_a_folder_that_cannot_be_read_fails_by_name(tmp_path: Path):
    shutil.copytree(FIXTURES / "models" / "llama_c1", tmp_path / "models" / "broken")
    (tmp_path / "models" / "broken" / "model.safetensors").write_bytes(b"")
    (tmp_path / "models" / "stray.txt").write_text("")
    (tmp_path / "cases").mkdir()
    shutil.copy(FIXTURES / "cases" / "llama_c1__image_b1.safetensors", tmp_path / "cases")
    wrong = {result.name for result in cases.check(tmp_path) if not result.error <= result.tolerance}
    assert wrong == {"model broken", "cases without a model or a description"}
