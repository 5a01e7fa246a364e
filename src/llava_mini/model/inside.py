"""What a method does inside the language model: what the rows of a layer see, and which rows it gets.

The language model stays as transformers wrote it, and this is the narrowest way into it:

* What is to be done to some prompts is an object that the reducer makes, ``model.inside(fused)``. It travels as the
  keyword ``inside``: the language models of transformers hand keywords that they do not know to their layers.
* Two hooks on each decoder layer. Before it runs, its mask, rows and rotations are changed; after it, rows that it was
  not given get their places back.

transformers takes a mask of one's own, but the same for all layers, and ``generate`` counts positions in a mask of two
dimensions; to give a layer fewer rows than the one before, it has no interface at all. Modelling code is not copied:
hooks know only what the families of ``prefusion.FAMILIES`` call the arguments and parts of a decoder layer.

Between layers every row has its place, so labels, hidden states and the head are as ever. Rows that were dropped hold
nothing of meaning there and have no keys and values in later layers; all others keep their positions.

Shapes: B prompts, S rows of a fused prompt, R rows of one call, K of them that are kept, C keys, D language width,
W width of a head.
"""

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import FusedPrompt
from llava_mini.model.prefusion import FAMILIES, Rotation, rotated_heads

if TYPE_CHECKING:
    from llava_mini.model.reducers.base import Reducer

KEYWORD = "inside"
"""The name under which an ``Inside`` is handed on."""


@dataclass(frozen=True)
class PromptRows:
    """Where frames stand in some prompts."""

    is_image: Tensor
    """[B, S] bool."""
    last: Tensor
    """[B] int64: the last row before the first answer that has labels, or of the prompt."""
    tokens_per_frame: int

    @classmethod
    def of(cls, fused: FusedPrompt, config: LlavaMiniConfig) -> Self:
        """Find them in fused prompts."""
        asked = fused.attention_mask.bool()
        if fused.labels is not None:
            asked = asked & ((fused.labels != -100).cumsum(1) == 0)
        places = torch.arange(asked.shape[1], device=asked.device)
        last = places.masked_fill(~asked, 0).amax(1)
        return cls(fused.input_ids == config.image_token_id, last, config.tokens_per_frame)

    @property
    def frames(self) -> Tensor:
        """The frame of each row, counted in its prompt from 0, and -1 for text: [B, S] int64."""
        return torch.where(self.is_image, (self.is_image.cumsum(1) - 1) // self.tokens_per_frame, -1)

    def last_of_frame(self, number: int) -> Tensor:
        """The last so many rows of each frame: [B, S] bool."""
        place = (self.is_image.cumsum(1) - 1) % self.tokens_per_frame
        return self.is_image & (place >= self.tokens_per_frame - number)

    def take(self, prompts: Tensor) -> Self:
        """Those of some prompts, [prompts] int64."""
        return replace(self, is_image=self.is_image[prompts], last=self.last[prompts])

    def fitted(self, values: Tensor, hidden: Tensor, length: int, fill: bool | int = False) -> Tensor:
        """Values of rows [B, S] for a call with rows [B', R, D], with more text after them: [B', length].

        Copies of a prompt, as beams are, stand side by side.
        """
        copies = values.repeat_interleave(hidden.shape[0] // values.shape[0], dim=0).to(hidden.device)
        return nn.functional.pad(copies, (0, length - copies.shape[1]), value=fill)


@dataclass(frozen=True)
class LayerInput:
    """What a decoder layer is about to be given."""

    index: int
    """Which layer, from 0."""
    layer: nn.Module
    hidden: Tensor
    """[B, R, D]."""
    mask: Tensor | None
    """[B, 1, R, C]: what each row sees, True, or 0 among numbers that are added. None: all up to itself."""
    rotation: Rotation
    """Cosines and sines of the rows' positions, each [1 or B, R, W]."""
    num_before: int
    """Keys and values that the layer holds from earlier calls."""
    capacity: int
    """Keys and values that the layer has room for. 0: as many as come."""
    places: "Places | None" = None
    """Where the rows belong among those of the layer before. None: they are the same."""

    def explicit_mask(self, start: int) -> Tensor:
        """The mask, made if there is none; ``start`` is the place of the first row in its prompt."""
        if self.mask is not None:
            return self.mask
        rows = start + torch.arange(self.hidden.shape[1], device=self.hidden.device)
        keys = torch.arange(self.capacity or start + len(rows), device=rows.device)
        return (keys <= rows[:, None])[None, None]  # [1, 1, R, C]


class Inside:
    """What is done to some prompts, in one pass over them or in one call of ``generate``. This one does nothing."""

    def before(self, given: LayerInput) -> LayerInput:
        """Change what a layer is given."""
        return given

    def going_on(self, prompts: Tensor) -> "Inside":
        """The same for prompts that go on with text, as these may in several ways, once these were read.

        Args:
            prompts: [prompts] int64: which of these each one begins with.
        """
        return self


@dataclass(frozen=True)
class Places:
    """Rows that are kept of each prompt, moved to the left; where prompts keep fewer, some that are not fill up."""

    order: Tensor
    """[B, K] int64: the place of each."""
    valid: Tensor
    """[B, K] bool: those that are kept."""
    num_rows: int
    """R, of which they are."""
    is_even: bool
    """Whether all prompts keep equally many."""

    @classmethod
    def of(cls, keep: Tensor) -> Self:
        """Those that ``keep``, [B, R] bool, names."""
        most = int(keep.sum(1).max())
        order = torch.argsort((~keep).int(), dim=1, stable=True)[:, :most]
        valid = keep.gather(1, order)
        return cls(order, valid, keep.shape[1], bool(valid.all()))

    def take(self, rows: Tensor) -> Tensor:
        """[B or 1, R, ...] to [B, K, ...]."""
        whole = rows.expand(len(self.order), *rows.shape[1:])
        index = self.order.view(*self.order.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
        return whole.gather(1, index)

    def put_back(self, rows: Tensor) -> Tensor:
        """[B, K, D] to [B, R, D]."""
        index = self.order[..., None].expand_as(rows)
        return rows.new_zeros(len(rows), self.num_rows, rows.shape[2]).scatter(1, index, rows)


class Dropping(Inside, ABC):
    """Drops rows of the prompts, the same ones in all layers from one on. They are chosen when a prompt is read.

    The layers before keep all keys and values, which answers go on to read; later ones hold those of kept rows alone.
    """

    def __init__(self, rows: PromptRows, first_layer: int) -> None:
        """Say of which prompts, and which layer is the first to get fewer rows, counted from 0."""
        self.rows = rows
        self._first_layer = first_layer
        self._places: Places | None = None

    @abstractmethod
    def keep(self, given: LayerInput) -> Tensor:
        """Which rows stay, [B, R] bool: all text, and some of each prompt's frames."""

    def look(self, given: LayerInput) -> None:
        """Note something of what the last layer that gets all rows is given."""

    def changed(self, given: LayerInput) -> Tensor:
        """What the rows [B, R, D] are before some are dropped."""
        return given.hidden

    def before(self, given: LayerInput) -> LayerInput:
        """Drop rows where a prompt is read; where its answer goes on, hide none of the rows that were kept."""
        is_prompt = given.num_before == 0
        if is_prompt and given.index == self._first_layer - 1:
            self._check_whole(given)
            self.look(given)
        if given.index < self._first_layer:
            return given
        if is_prompt and given.index == self._first_layer:
            given = replace(given, hidden=self.changed(given))
            self._places = Places.of(self.keep(given))
        places = self._places
        if places is None:
            raise ValueError(
                "Keys and values of the beginning of a prompt were given, but the reducer drops rows by what the whole "
                "prompt holds. Leave past_key_values out, or empty."
            )
        if not is_prompt:
            return replace(given, mask=_mask_of_answer(given, places))
        return replace(
            given,
            hidden=places.take(given.hidden),
            mask=_mask_of_prompt(given, places),
            rotation=(places.take(given.rotation[0]), places.take(given.rotation[1])),
            places=places,
        )

    def going_on(self, prompts: Tensor) -> Self:
        """Of each prompt the rows stay that stay of the one that it begins with."""
        places, made = self._places, copy(self)
        made.rows = self.rows.take(prompts)
        if places is not None:
            made._places = replace(places, order=places.order[prompts], valid=places.valid[prompts])
        return made

    def _check_whole(self, given: LayerInput) -> None:
        wanted, found = self.rows.is_image.shape[1], given.hidden.shape[1]
        if found < wanted:
            raise ValueError(
                f"The first {found} of {wanted} rows of a prompt came alone, but the reducer drops rows by what the "
                "whole prompt holds. Give it at once; leave prefill_chunk_size out."
            )


def arguments(reducer: "Reducer", fused: FusedPrompt, config: LlavaMiniConfig) -> dict[str, Inside]:
    """What the language model is given besides some prompts: nothing, unless the reducer acts inside it.

    Raises:
        ValueError: the attention kernel takes no masks.
    """
    if not reducer.acts_inside:
        return {}
    kernel = config.text._attn_implementation
    if ALL_MASK_ATTENTION_FUNCTIONS.get(str(kernel)) not in (sdpa_mask, eager_mask):
        raise ValueError(
            f"The reducer {config.reducer!r} decides which rows the language model sees, and the attention kernel "
            f"{kernel!r} takes no such mask. Load the model with attn_implementation='sdpa' or 'eager'."
        )
    has_frames = any(fused.num_frames)
    return {KEYWORD: reducer.inside(PromptRows.of(fused, config)) if has_frames else Inside()}


def let_in(reducer: "Reducer", language_model: nn.Module, config: LlavaMiniConfig) -> None:
    """Put hooks on the layers of a language model, if the reducer acts inside it.

    Raises:
        ValueError: a family of language models that is not known, one with a sliding window, too few layers, or
            pre-fusion, which reads rows that exist only later.
    """
    if not reducer.acts_inside:
        return
    text, num_layers = config.text, config.text.num_hidden_layers
    if text.model_type not in FAMILIES or _has_window(text):
        raise ValueError(
            f"The reducer {config.reducer!r} acts inside the language models {', '.join(FAMILIES)}, as long as they "
            f"have no sliding window; got {text.model_type!r}. Choose another reducer or language model."
        )
    if config.prefusion_num_layers:
        raise ValueError(
            f"The reducer {config.reducer!r} acts inside the language model, after which no pre-fusion can come. Set "
            "prefusion_num_layers=0."
        )
    if reducer.drops_inside and config.reducer_layer >= num_layers:
        raise ValueError(
            f"The reducer {config.reducer!r} drops rows after layer {config.reducer_layer} of a language model that "
            f"has {num_layers}. Give a smaller reducer_layer."
        )
    for index, layer in enumerate(cast(Any, language_model).get_decoder().layers):
        layer.register_forward_pre_hook(partial(_before, index), with_kwargs=True)
        layer.register_forward_hook(_after, with_kwargs=True)


def attention_of_row(given: LayerInput, row: Tensor, model_type: str) -> Tensor:
    """How much one row of each prompt looks at each row when it is read, averaged over heads: [B, R] float32.

    Args:
        given: what the layer is given, of prompts from their beginning.
        row: [B] int64.
        model_type: of the language model.
    """
    attention, rotate = cast(Any, given.layer).self_attn, FAMILIES[model_type].rotate
    hidden = cast(Any, given.layer).input_layernorm(given.hidden)
    one = Places(row[:, None], torch.ones_like(row[:, None], dtype=torch.bool), hidden.shape[1], True)
    at_row = (one.take(given.rotation[0]), one.take(given.rotation[1]))
    query = rotated_heads(attention, "q", one.take(hidden), at_row, rotate)  # [B, heads, 1, W]
    keys = rotated_heads(attention, "k", hidden, given.rotation, rotate)  # [B, key heads, R, W]
    query = query.squeeze(2).unflatten(1, (keys.shape[1], -1))  # [B, key heads, heads / key heads, W]
    products = (query @ keys.transpose(2, 3)).float() * attention.scaling
    mask = one.take(given.explicit_mask(0)[:, 0])[..., : hidden.shape[1]]  # [B, 1, R]
    seen = mask if mask.dtype == torch.bool else mask == 0
    return products.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean((1, 2))


def restrict(mask: Tensor, seen: Tensor) -> Tensor:
    """Hide in a mask, as ``LayerInput`` has it, what is not ``seen`` (bool)."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _mask_of_prompt(given: LayerInput, places: Places) -> Tensor | None:
    """Among kept rows of a prompt each one sees the kept ones that it saw."""
    if given.mask is None and places.is_even:
        return None
    mask = given.explicit_mask(0)[:, 0]  # [B, R, C]
    return _of_kept(places.take(mask)[:, None], places, given.capacity)


def _mask_of_answer(given: LayerInput, places: Places) -> Tensor | None:
    """Rows of an answer see the kept rows of the prompt and what came after it."""
    if given.mask is None and places.is_even and not given.capacity:
        return None
    start = places.num_rows + given.num_before - places.order.shape[1]
    return _of_kept(given.explicit_mask(start), places, given.capacity)


def _of_kept(mask: Tensor, places: Places, capacity: int) -> Tensor:
    """Take the columns of kept rows out of a mask [B, 1, rows, C], and all columns after the prompt's."""
    mask = mask.expand(len(places.order), -1, -1, -1)
    index = places.order[:, None, None].expand(-1, -1, mask.shape[2], -1)
    kept = restrict(mask.gather(3, index), places.valid[:, None, None])
    mask = torch.cat([kept, mask[..., places.num_rows :]], dim=3)
    spare = capacity - mask.shape[3] if capacity else 0  # keys of a cache of fixed size that nothing fills
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return nn.functional.pad(mask, (0, spare), value=hidden)


def _before(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inside = kwargs.get(KEYWORD)
    if inside is None:
        raise ValueError(
            "The reducer of this model acts inside the language model, which was called without a word about where the "
            "frames of the prompts stand. Call the model itself, or hand on what model.inside(fused) returns."
        )
    cache: Cache | None = kwargs.get("past_key_values")
    given = inside.before(
        LayerInput(
            index=index,
            layer=layer,
            hidden=args[0],
            mask=kwargs.get("attention_mask"),
            rotation=kwargs["position_embeddings"],
            num_before=0 if cache is None else int(cache.get_seq_length(index)),
            capacity=0 if cache is None else max(cache.get_max_length(index), 0),
        )
    )
    changed = {"attention_mask": given.mask, "position_embeddings": given.rotation, KEYWORD: given.places}
    return (given.hidden, *args[1:]), {**kwargs, **changed}


def _after(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    places: Places | None = kwargs[KEYWORD]
    return output if places is None else places.put_back(output)


def _has_window(text: PreTrainedConfig) -> bool:
    if text.model_type == "mistral":
        return text.sliding_window is not None
    return "sliding_attention" in (getattr(text, "layer_types", None) or ())
