"""From a fused prompt to the ids of its answer, by transformers' own ``generate``.

``generate`` runs in a thread of its own, so that each token is at hand as soon as it is chosen, and
so that whoever reads them may stop at any token.
"""

import time
from collections.abc import Generator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llava_mini.flow import FusedPrompt
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

PREFILL_TOKENS = 2048
"""Most tokens of a prompt that the language model reads at a time."""


class Token(NamedTuple):
    """One token of an answer."""

    id: int
    at: float
    """When it was chosen, on the clock of ``time.perf_counter``."""


def generate_tokens(
    model: LlavaMiniForConditionalGeneration,
    fused: FusedPrompt,
    *,
    max_tokens: int,
    temperature: float,
    cache: DynamicCache | None = None,
) -> Generator[Token]:
    """The tokens of an answer, one by one, the one that ends it included.

    Closing the iterator stops the model after the token it is working on.

    Args:
        model: continues the prompt; its generation configuration says at which ids to stop.
        fused: one prompt.
        max_tokens: stop after so many.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        cache: keys and values of the first positions of the prompt, maybe none. Those of the others and of the
            answer are added.
    """
    cache = DynamicCache() if cache is None else cache
    tokens: SimpleQueue[Token | BaseException | None] = SimpleQueue()
    stop = Event()

    def work() -> None:
        try:
            with torch.inference_mode():
                _prefill(model, fused, cache, stop)
                if not stop.is_set():  # otherwise all that is left of a long prompt would be read at once
                    model.generate(
                        fused=fused,
                        past_key_values=cache,
                        max_new_tokens=max_tokens,
                        pad_token_id=_pad_token_id(model),
                        streamer=cast(Any, _Feed(tokens)),
                        stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                        **_sampling(temperature),
                    )
            tokens.put(None)
        except BaseException as error:
            tokens.put(error)

    thread = Thread(target=work, name="llava-mini generate", daemon=True)
    try:
        thread.start()  # an interruption may come from here on, and must not leave it alone
        while (token := tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def generate_batch(
    model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, *, max_tokens: int, temperature: float
) -> tuple[list[list[int]], list[float]]:
    """The answers to several prompts, made side by side.

    Args:
        model: as in ``generate_tokens``, like the others.
        fused: prompts, padded on the left.
        max_tokens: stop each answer after so many.
        temperature: 0 takes the likeliest token each time.

    Returns:
        Ids of each answer, the one that ends it included, and when each step was done, on the clock of
        ``time.perf_counter``.
    """
    steps = _Steps()
    with torch.inference_mode():
        output = model.generate(
            fused=fused,
            max_new_tokens=max_tokens,
            pad_token_id=_pad_token_id(model),
            streamer=cast(Any, steps),
            **_sampling(temperature),
        )
    ends, answers = stop_ids(model), []
    for row in cast(Tensor, output)[:, fused.input_ids.shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:length])
    return answers, steps.times


def _sampling(temperature: float) -> dict[str, Any]:
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _prefill(model: LlavaMiniForConditionalGeneration, fused: FusedPrompt, cache: DynamicCache, stop: Event) -> None:
    """Run a long prompt through the language model in pieces, up to the last of them, if the reducer lets it be cut."""
    if model.reducer.drops_inside:
        return
    length, inside = fused.inputs_embeds.shape[1], model.inside(fused)
    while (start := cache.get_seq_length()) < length - PREFILL_TOKENS and not stop.is_set():
        piece = fused.inputs_embeds[:, start : start + PREFILL_TOKENS].to(model.dtype)
        model.language_model.get_decoder()(inputs_embeds=piece, past_key_values=cache, use_cache=True, **inside)


def stop_ids(model: LlavaMiniForConditionalGeneration) -> set[int]:
    """The ids that end an answer."""
    assert model.generation_config is not None
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def _pad_token_id(model: LlavaMiniForConditionalGeneration) -> int:
    """Any id will do for a single prompt; without one, transformers warns each time."""
    known = model.config.text.pad_token_id
    return known if known is not None else min(stop_ids(model), default=0)


class _Feed(BaseStreamer):
    """Passes each new token on. ``generate`` begins with the prompt, which is left out."""

    def __init__(self, tokens: "SimpleQueue[Token | BaseException | None]") -> None:
        self.tokens = tokens
        self.saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self.saw_prompt:
            self.tokens.put(Token(int(value.flatten()[0]), time.perf_counter()))
        self.saw_prompt = True

    def end(self) -> None:
        """The end is told when ``generate`` has returned."""


class _Steps(BaseStreamer):
    """Notes when each token of a batch was chosen. ``generate`` begins with the prompt, which is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self) -> None:
        """The end is told when ``generate`` has returned."""


class _Stop(StoppingCriteria):
    """Ends the answer when nobody reads it any more."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> torch.BoolTensor:
        stopped = torch.full((input_ids.shape[0],), self.stop.is_set(), device=input_ids.device)
        return cast(torch.BoolTensor, stopped)
