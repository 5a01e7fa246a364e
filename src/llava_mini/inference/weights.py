"""Which weights a model has: keeps apart what one model has seen and what another would see."""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration


class Weights:
    """The weights of some parts of a model, watched for changes."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._known: dict[str, tuple[object, str]] = {}

    def stamp(self) -> str:
        """Return a text that is new whenever a weight was replaced or changed in place. Its cost is small.

        It means something as long as this object lives, and no two objects share one.
        """
        return self._remembered("stamp", lambda tensors: uuid.uuid4().hex)

    def digest(self) -> str:
        """Return a digest of all weights, the same in every process. All are read once, and again after a change."""
        return self._remembered("digest", _digest)

    def _remembered(self, name: str, make: Callable[[Sequence[Tensor]], str]) -> str:
        tensors = [tensor for part in self._parts for tensor in (*part.parameters(), *part.buffers())]
        state = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        if name not in self._known or self._known[name][0] != state:
            self._known[name] = (state, make(tensors))
        return self._known[name][1]


def weights_before_language(model: LlavaMiniForConditionalGeneration) -> Weights:
    """Return the weights that frames pass on their way to the language model."""
    parts = [model.vision_tower, model.reducer, model.projector, model.prefusion]
    return Weights([part for part in parts if part is not None])


def config_digest(model: LlavaMiniForConditionalGeneration) -> str:
    """Return a digest of the configuration."""
    text = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
