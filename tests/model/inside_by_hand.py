"""Methods that act inside the language model, in their plainest form: one prompt, layer by layer, without a cache.

Rows that a method drops are only hidden here from all others; what they hold themselves means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from llava_mini.flow import FusedPrompt
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.positions import sine_cosine_2d
from llava_mini.model.reducers.query_inside import QueryInside
from tests.tiny_models import IMAGE_TOKEN, tiny_model

Model = LlavaMiniForConditionalGeneration


@dataclass(frozen=True)
class ByHand:
    """What a method does to one prompt of S rows."""

    seen: Callable[[int], Tensor]
    """For each layer which rows see which, [S, S] bool."""
    stays: Tensor
    """[S] bool: the rows that mean something in the end."""
    changed: Callable[[int, Tensor], Tensor] = lambda _, rows: rows
    """What the rows [S, D] are before a layer."""


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def from_layer(first: int, stays: Tensor) -> Callable[[int], Tensor]:
    """All rows are seen before a layer, and from it on those that stay."""
    return lambda index: causal(len(stays)) & (stays if index >= first else torch.ones_like(stays))


def fastv(model: Model, twin: Model, rows: Tensor, is_image: Tensor, length: int) -> ByHand:
    config = model.config
    output = twin.language_model(inputs_embeds=rows[None], output_attentions=True)
    looked = output.attentions[config.reducer_layer - 1][0].mean(0)[length - 1].masked_fill(~is_image, -1)
    looked[length - 1 :] = looked[length - 1 :].masked_fill(is_image[length - 1 :], torch.inf)  # it answers
    number = int(is_image.sum()) // config.tokens_per_frame * config.reducer_tokens
    stays = ~is_image
    stays[looked.topk(number).indices] = True
    return ByHand(from_layer(config.reducer_layer, stays), stays)


def voco(model: Model, twin: Model, rows: Tensor, is_image: Tensor, length: int) -> ByHand:
    per_frame, number = model.config.tokens_per_frame, model.config.reducer_tokens
    places = [int(place) for place in is_image.nonzero()[:, 0]]
    frame_of = {place: index // per_frame for index, place in enumerate(places)}
    gathering = {place for index, place in enumerate(places) if index % per_frame >= per_frame - number}
    first = min(places, default=len(rows))

    def sees(row: int, key: int) -> bool:
        if key > row:
            return False
        if row in frame_of:
            return key < first or frame_of.get(key) == frame_of[row]
        return key not in frame_of or key in gathering

    seen = torch.tensor([[sees(row, key) for key in range(len(rows))] for row in range(len(rows))])
    return ByHand(lambda _: seen, torch.ones(len(rows), dtype=torch.bool))


def query_inside(model: Model, twin: Model, rows: Tensor, is_image: Tensor, length: int) -> ByHand:
    config, reducer = model.config, model.reducer
    assert isinstance(reducer, QueryInside)
    frames = is_image.nonzero()[:, 0].view(-1, config.tokens_per_frame)  # [F, P] places
    last = frames[:, frames.shape[1] - config.reducer_grid**2 :]
    stays = ~is_image
    stays[last.flatten()] = True

    def changed(index: int, hidden: Tensor) -> Tensor:
        if index != config.reducer_layer:
            return hidden
        hidden = hidden.clone()
        for patches, places in zip(frames, last, strict=True):
            values = reducer.row_norm(hidden[patches])[None]
            codes = [sine_cosine_2d(side, values.shape[2]) for side in (config.patches_per_side, config.reducer_grid)]
            queries = reducer.query_norm(reducer.queries)[None] + codes[1]
            hidden[places] = reducer.attend(queries, values + codes[0], values)[0][0]
        return hidden

    return ByHand(from_layer(config.reducer_layer, stays), stays, changed)


METHODS: dict[str, tuple[dict[str, Any], Callable[[Model, Model, Tensor, Tensor, int], ByHand]]] = {
    "fastv": ({"reducer_tokens": 5}, fastv),
    "voco": ({"reducer_tokens": 2}, voco),
    "query_inside": ({"reducer_grid": 2}, query_inside),
}
"""Fields of a configuration, and what the method does: for a model, its plain twin, the rows [S, D] of a prompt and
perhaps of an answer, which of them are of frames [S], and the length of the prompt."""


def inside_model(method: str, family: str = "llama", **fields: Any) -> Model:
    return tiny_model(family, **{"reducer": method, "prefusion_num_layers": 0, **METHODS[method][0], **fields})


def plain_twin(model: Model) -> Model:
    """The same weights as a LLaVA-1.5 with the eager kernel, in which nothing acts."""
    text = {name: getattr(model.config.text, name) for name in ("num_hidden_layers",)}
    if model.config.text.model_type == "mistral":
        text["sliding_window"] = None
    twin = tiny_model(model.config.text.model_type, reducer="identity", prefusion_num_layers=0, text=text)
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("reducer.")})
    twin.set_attn_implementation("eager")
    return twin


def logits_by_hand(twin: Model, rows: Tensor, by_hand: ByHand) -> Tensor:
    """Logits at every row of one prompt [S, D]: [S, vocabulary]."""
    decoder: Any = cast(Any, twin.language_model).model
    hidden, positions = rows[None], torch.arange(len(rows))[None]
    rotation = decoder.rotary_emb(hidden, positions)
    for index, layer in enumerate(decoder.layers):
        hidden = by_hand.changed(index, hidden[0])[None]
        mask = torch.zeros(len(rows), len(rows)).masked_fill(~by_hand.seen(index), torch.finfo(torch.float32).min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotation)
    return cast(Any, twin.language_model).lm_head(decoder.norm(hidden))[0]


@dataclass(frozen=True)
class Expected:
    """What a model must make of one prompt."""

    logits: Tensor
    """[S, vocabulary]."""
    stays: Tensor
    """[S] bool: rows whose logits mean something."""
    answer: Tensor
    """Greedy ids."""


def expected(model: Model, fused: FusedPrompt, prompt: int, num_tokens: int = 0) -> Expected:
    """Logits of one prompt of a batch, and a greedy answer, for each token of which everything runs again."""
    twin, method = plain_twin(model), METHODS[model.config.reducer][1]
    mask = fused.attention_mask[prompt].bool()
    rows, is_image = fused.inputs_embeds[prompt, mask], fused.input_ids[prompt, mask] == IMAGE_TOKEN
    length = len(rows)
    by_hand = method(model, twin, rows, is_image, length)
    first = logits = logits_by_hand(twin, rows, by_hand)
    stays, answer = by_hand.stays, []
    for _ in range(num_tokens):
        answer.append(int(logits[-1].argmax()))
        rows = torch.cat([rows, twin.get_input_embeddings()(torch.tensor(answer[-1:]))])
        is_image = torch.cat([is_image, torch.tensor([False])])
        logits = logits_by_hand(twin, rows, method(model, twin, rows, is_image, length))
    return Expected(first, stays, torch.tensor(answer, dtype=torch.long))
