"""Contestants compute what they say, take turns, and are all in the report; how fast they are is not asserted."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache

from llava_mini.benchmarks import latency, peers, sizes
from llava_mini.benchmarks.compiled import OursCompiled
from llava_mini.benchmarks.contestants import LanguageModel, Ours, OursAsReleased, Words
from llava_mini.benchmarks.floors import Rates, floors
from llava_mini.benchmarks.latency import Settings, with_tokens
from llava_mini.benchmarks.peers import PEERS, build_peers
from llava_mini.benchmarks.timing import Laps, take_turns
from llava_mini.model.cost import flops, weight_bytes
from tests.tiny_models import batch, pixels, prompt, tiny_config, tiny_model

CPU = torch.device("cpu")
VARIANTS = [
    {},
    {"reducer_grid": 2},
    {"vision_tokens_from": "reducer"},
    {"reducer": "identity"},
    {"prefusion_num_layers": 0},
    {"resolution_ratio": 2},
]


def words(kept=3, question=4):
    ids = torch.arange(5, 5 + kept + question)[None]
    return Words(kept=ids[:, :kept], question=ids[:, kept:])


def silent():
    return Laps(device=CPU, by_part=False)


def keys_of(answering):
    return torch.stack([layer.keys for layer in answering.cache.layers])


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("kept", [0, 3])
def test_ours_reads_what_the_model_reads_first_and_later_in_both_orders(fields, kept):
    model, text = tiny_model(**fields), words(kept=kept)
    image = pixels(model.config, 1)
    ids = prompt(model.config, text.kept[0].tolist(), 1, text.question[0].tolist())
    out = model(**batch([ids]), pixel_values=image, use_cache=True)
    expected = torch.stack([layer.keys for layer in out.past_key_values.layers])
    for kind in (Ours, OursAsReleased):
        one = kind("ours", model, image, text)
        kept_state = one.keep()
        for answering in (one.first(silent()), one.later(kept_state, silent()), one.later(kept_state, silent())):
            torch.testing.assert_close(keys_of(answering), expected, atol=1e-4, rtol=1e-4)
            assert answering.token.item() == out.logits[0, -1].argmax().item()


@torch.inference_mode()
def test_peers_are_built_and_a_later_question_reads_what_a_first_one_would():
    four_layers = {"num_hidden_layers": 4}  # IDEFICS looks at the image in every fourth
    config = tiny_config(text=four_layers)
    language, text = LanguageModel(tiny_model(text=four_layers).language_model), words()
    built, missing = build_peers(config, language, text, is_tiny=True, dtype=torch.float32)
    assert missing == {}
    assert [one.name for one in built] == list(PEERS)
    assert [one.tokens for one in built] == [16, 16 + 8 * 9, 32, 32, 4, 0]
    for one in built:
        first, kept = one.first(silent()), one.keep()
        for _ in range(2):  # what is kept stays as it is
            later = one.later(kept, silent())
            torch.testing.assert_close(keys_of(later), keys_of(first), atol=1e-4, rtol=1e-4)
        assert one.step(later).cache.get_seq_length() == keys_of(first).shape[-2] + 1


@torch.no_grad()
def test_the_compiled_contestant_answers_as_the_plain_one_and_leaves_its_model_alone(monkeypatch):
    compiled = []

    def compile_nothing(call, **options):
        compiled.append(call)
        return call

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model, text = tiny_model(), words()
    layers = [*model.vision_tower.encoder.layers, *model.prefusion.layers]
    image = pixels(model.config, 1)
    plain, one = Ours("plain", model, image, text), OursCompiled("compiled", model, image, text)
    assert all(layer in compiled for layer in layers)
    assert len(compiled) == len(layers) + 1  # and the step of the answer
    addresses = set()
    for _ in range(2):
        expected, found = plain.first(silent()), one.first(silent())
        for _ in range(4):
            assert found.token.item() == expected.token.item()
            expected, found = plain.step(expected), one.step(found)
        assert isinstance(found.cache, StaticCache)
        length = expected.cache.get_seq_length()
        torch.testing.assert_close(keys_of(found)[..., :length, :], keys_of(expected), atol=1e-4, rtol=1e-4)
        addresses |= {layer.keys.data_ptr() for layer in found.cache.layers}
    assert len(addresses) == len(found.cache.layers)  # graphs of a GPU are bound to them
    assert [*model.vision_tower.encoder.layers, *model.prefusion.layers] == layers


def test_a_floor_is_the_slower_of_multiplying_and_reading():
    config = tiny_config()
    slow_to_read = floors(config, "float32", 43, Rates(operations=1e15, bandwidth=1e3))
    bytes_of = weight_bytes(config, "float32")
    assert slow_to_read.first == pytest.approx(bytes_of.total / 1e3)
    assert slow_to_read.token == pytest.approx(bytes_of.language_model / 1e3)
    slow_to_multiply = floors(config, "float32", 43, Rates(operations=1e3, bandwidth=1e15))
    assert slow_to_multiply.first == pytest.approx(flops(config).total / 1e3)


def test_parts_add_up_to_the_whole_way():
    model, text = tiny_model(), words()
    one, laps = Ours("ours", model, pixels(model.config, 1), text), Laps(device=CPU, by_part=True)
    laps.start()
    with torch.inference_mode():
        one.first(laps)
    assert list(laps.seconds) == ["vision", "reduction", "pre-fusion", "prefill"]
    assert all(seconds > 0 for seconds in laps.seconds.values())


def test_models_with_other_tokens_share_all_weights_but_the_reducers():
    model = tiny_model()
    other = with_tokens(model, 4)
    assert (model.config.tokens_per_frame, other.config.tokens_per_frame) == (1, 4)
    assert other.prefusion is model.prefusion
    assert other.reducer is not model.reducer
    assert model.reducer.queries.shape[0] == 1


def test_things_take_turns_and_one_without_memory_leaves():
    order = []

    def hungry():
        order.append("hungry")
        if len(order) > 3:
            raise torch.OutOfMemoryError("no")
        return 1

    calls = {"hungry": hungry, "modest": lambda: order.append("modest") or 2}
    found = take_turns(calls, warmup=1, repeats=2)
    assert order == ["hungry", "modest", "hungry", "modest", "hungry", "modest"]
    assert found == {"hungry": [1], "modest": [2, 2]}


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:

        def broken(*_):
            raise TypeError("no such argument\nat some place")

        patch.setattr(peers, "PEERS", {"LLaVA-v1.5": PEERS["LLaVA-v1.5"], "Broken": broken})
        return latency.run(Settings(size="tiny", tokens=(1, 4), repeats=2, warmup=0, answer_tokens=1, device="cpu"))


def test_every_contestant_is_in_table_and_json_with_every_time(report):
    found = json.loads(report.line())["results"]["contestants"]
    names = ["LLaVA-Mini, released order", "LLaVA-Mini, 1 token", "LLaVA-Mini, 4 tokens", "LLaVA-v1.5"]
    assert list(found) == names
    for name, one in found.items():
        assert name in str(report)
        assert [len(one[key]) for key in ("first_ms", "later_ms", "token_ms")] == [2, 2, 2]
        assert all(len(times) == 2 for times in one["first_parts_ms"].values())
    assert list(found["LLaVA-Mini, 4 tokens"]["later_parts_ms"]) == ["pre-fusion", "prefill"]
    assert list(found["LLaVA-v1.5"]["first_parts_ms"]) == ["vision", "reduction", "prefill"]


def test_a_peer_that_cannot_be_built_is_told_in_the_table(report):
    assert report.results["missing"] == {"Broken": "TypeError: no such argument"}
    assert any(
        "Broken" in line and "not run" in line and "no such argument" in line for line in str(report).split("\n")
    )


def test_the_settings_say_what_was_chosen(report):
    assert (report.settings["device"], report.settings["dtype"]) == ("cpu", "float32")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"size": "huge"}, "no size 'huge'"),
        ({"tokens": (1, 1)}, "each of them once"),
        ({"tokens": (5,)}, "square.*got 5"),
        ({"kept_tokens": 43}, "some of the 43 words.*got 43"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(sizes, "available_memory", lambda device: 10**9)
    with pytest.raises(ValueError, match=r"7.9 billion random weights.*on cpu in bfloat16.*1.0 GB are free"):
        latency.run(Settings(size="7b", device="cpu", dtype="bfloat16"))


def test_a_memory_limit_needs_a_gpu():
    with pytest.raises(ValueError, match="memory limit is for CUDA.*cpu"):
        latency.run(Settings(size="tiny", device="cpu", memory_limit=24))


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_memory_limit_is_the_share_of_the_gpu_that_torch_may_use(device, index, monkeypatch):
    limits = {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**37))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)

    def set_limit(share, device):
        limits[device] = share

    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", set_limit, raising=False)
    sizes.limit_memory(24, torch.device(device))
    assert limits == {index: 24 / 128}
