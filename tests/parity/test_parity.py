"""The shipped choice of parity fixtures is reproduced, and every file of it is read."""

import json
from pathlib import Path

import pytest

from tests.parity import cases, check, preprocess
from tests.parity.result import Result

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = {"llama_c1": 11, "vicuna_c2": 2, "llama_hd_c4": 1, "wide1024_c2": 1}


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


def test_a_wrong_number_is_seen():
    model = cases.load_model(FIXTURES / "models" / "llama_c1")
    case = cases.read_case(FIXTURES / "cases" / "llama_c1__image_b1.json", model)
    case.tensors["out/logits"] += 1e-3
    case.tensors["out/unknown"] = case.tensors["out/logits"]
    results = cases.check_case(case, model, FIXTURES / "tokenizers" / "llama3_tiny")
    wrong = [result.name.split("/", 1)[1] for result in results if not result.error <= result.tolerance]
    assert wrong == ["out/logits", "out/logits", "coverage"]
