"""Tokens one by one are the tokens of ``generate``, and reading may stop at any of them."""

import threading
import time

import pytest
import torch

from llava_mini.flow import ModelInputs
from llava_mini.inference import torch_backend
from llava_mini.inference.torch_backend import generate_tokens, stop_ids
from tests.tiny_models import pixels, prompt, tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def fused(model):
    ids = torch.tensor([prompt(model.config, [5, 6], 2, [7, 8, 9])])
    with torch.inference_mode():
        return model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels(model.config, 2)))


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "llava-mini generate"]


def test_tokens_are_those_of_generate(model, fused):
    whole = model.generate(fused=fused, max_new_tokens=12, do_sample=False)[0, fused.input_ids.shape[1] :]
    tokens = list(generate_tokens(model, fused, max_tokens=12, temperature=0))
    assert [token.id for token in tokens] == whole.tolist()
    assert [token.at for token in tokens] == sorted(token.at for token in tokens)


def test_sampling_draws_and_greedy_does_not(model, fused):
    def draw(temperature, seed):
        torch.manual_seed(seed)
        return [token.id for token in generate_tokens(model, fused, max_tokens=12, temperature=temperature)]

    assert draw(2.0, 0) == draw(2.0, 0)
    assert len({tuple(draw(2.0, seed)) for seed in range(4)}) > 1
    assert draw(0, 0) == draw(0, 1)


def test_the_models_own_stop_ids_end_an_answer(model, fused):
    first, second = [token.id for token in generate_tokens(model, fused, max_tokens=2, temperature=0)]
    model.generation_config.eos_token_id = [first, 40]
    assert stop_ids(model) == {first, 40}
    assert [token.id for token in generate_tokens(model, fused, max_tokens=9, temperature=0)] == [first]
    model.generation_config.eos_token_id = second
    assert [token.id for token in generate_tokens(model, fused, max_tokens=9, temperature=0)][-1] == second


def test_closing_stops_the_model(model, fused):
    model.generation_config.eos_token_id = None
    calls = []
    model.language_model.register_forward_hook(lambda *_: calls.append(1))
    tokens = generate_tokens(model, fused, max_tokens=400, temperature=0)
    next(tokens)
    assert workers()
    tokens.close()
    assert not workers()
    assert len(calls) < 400


def test_an_error_of_the_model_reaches_the_reader(model, fused):
    def fail(*_):
        raise RuntimeError("out of memory")

    model.language_model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generate_tokens(model, fused, max_tokens=4, temperature=0))
    assert not workers()


def test_an_interruption_while_a_long_prompt_is_read_ends_with_its_piece(model, fused, monkeypatch):
    pieces, read, interrupted = [], threading.Event(), threading.Event()

    class Interrupted:
        """In the place of the queue that the reader waits at."""

        def put(self, item):
            pass

        def get(self):
            assert read.wait(10)
            interrupted.set()
            raise KeyboardInterrupt

    def note(_, __, given, ___):
        pieces.append(given["inputs_embeds"].shape[1])
        read.set()
        assert interrupted.wait(10)
        time.sleep(0.05)

    monkeypatch.setattr(torch_backend, "PREFILL_TOKENS", 2)
    monkeypatch.setattr(torch_backend, "SimpleQueue", Interrupted)
    model.language_model.get_decoder().register_forward_hook(note, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        next(generate_tokens(model, fused, max_tokens=4, temperature=0))
    assert pieces == [2]
    assert not workers()
