"""What a model's results depend on besides their inputs: weights, configuration, kernels, adapters.

Whatever was kept under one of these texts no longer fits when the text has changed.
"""

import hashlib
import json
import uuid
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

_ADAPTER_SWITCHES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Where PEFT's layers hold what is switched on; their weights stay as they are."""


class ModelState:
    """Notices changes of a model.

    It sees tensors that were replaced or changed in place, other modules, another configuration or kernel, and adapters
    that were switched. Of changes behind torch's back, through ``tensor.data``, it sees those that reach one of two
    elements of some tensor, as any change of a whole tensor does.
    """

    def __init__(self, model: LlavaMiniForConditionalGeneration) -> None:
        self._model = model
        self._known: dict[str, tuple[_Snapshot, str]] = {}

    def frames(self, *, lasting: bool) -> str:
        """Return a text for all that frames pass on their way to the language model.

        Args:
            lasting: Whether it is the same in every process, which takes reading all these weights once, and again
                after a change; otherwise it means something as long as this object lives.
        """
        parts = (self._model.vision_tower, self._model.reducer, self._model.projector, self._model.prefusion)
        return self._text("lasting" if lasting else "frames", [part for part in parts if part is not None])

    def language(self) -> str:
        """Return a text for the language model. It means something as long as this object lives."""
        return self._text("language", [self._model.language_model])

    def _text(self, name: str, parts: Sequence[nn.Module]) -> str:
        snapshot = _Snapshot(parts)
        if name not in self._known or self._known[name][0] != snapshot:
            self._known[name] = snapshot, snapshot.digest() if name == "lasting" else uuid.uuid4().hex
        return f"{_settings(self._model)} {self._known[name][1]}"


class _Snapshot:
    """The tensors of some modules at one moment, without keeping them alive."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        modules = [module for part in parts for module in part.modules()]
        self._tensors = [
            weakref.ref(tensor)
            for module in modules
            for held in (*module._parameters.values(), *module._buffers.values())
            if held is not None
            for tensor in _plain(held)
        ]
        self._versions = [0 if tensor.is_inference() else tensor._version for tensor in self._alive()]
        self._switches = [
            f"{name} {vars(module)[name]}" for module in modules for name in _ADAPTER_SWITCHES if name in vars(module)
        ]
        self._probes = _probes(list(self._alive()))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Snapshot)
            and len(self._tensors) == len(other._tensors)
            and all(one() is two() is not None for one, two in zip(self._tensors, other._tensors, strict=True))
            and self._versions == other._versions
            and self._switches == other._switches
            and self._probes == other._probes
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def digest(self) -> str:
        """Return a digest of all values."""
        digest = hashlib.blake2b("\n".join(self._switches).encode(), digest_size=20)
        for tensor in self._alive():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _alive(self) -> Iterator[Tensor]:
        return (tensor for reference in self._tensors if (tensor := reference()) is not None)


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: one of 8 bits has its numbers and their scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor


def _probes(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Two elements of every tensor."""
    found: dict[object, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.numel():
            kind = (tensor.dtype, tensor.device)
            found[kind] += [tensor.detach()[tuple(side // part for side in tensor.shape)] for part in (2, 3)]
    return [torch.stack(elements).tolist() for elements in found.values()]


def _settings(model: LlavaMiniForConditionalGeneration) -> str:
    """Configuration, kernels, device and versions in a digest."""
    from llava_mini import __version__

    config = model.config
    kernels = [str(one._attn_implementation) for one in (config, config.vision, config.text)]
    facts = [config, kernels, model.device.type, str(model.dtype), torch.__version__, __version__]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=_plainly).encode(), digest_size=20).hexdigest()


def _plainly(value: object) -> object:
    """The fields of a configuration, without the copies that its ``to_dict`` makes; of anything else its name."""
    if isinstance(value, PreTrainedConfig):
        return {name: field for name, field in vars(value).items() if not name.startswith("_")}
    return str(value)
