"""Keys and values of the language model for prompts that were answered, for prompts that begin alike.

A position of a fused prompt depends on the tokens up to it, on which of them were fused, and on all frames of the
prompt, those after it included: text is averaged over them. Two prompts therefore share what they have in common at
the beginning if, and only if, they show the same frames in the same order. Then a later question runs its own tokens
alone, and so does a later turn of a conversation, up to the first answer that is read otherwise than it was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, kw_only=True)
class PromptKey:
    """What keys and values of a prompt depend on."""

    context: tuple[str, ...]
    """The weights, and the frames in their order."""
    ids: Tensor
    """[S] int64, on the CPU: of every position, the image token for frames."""
    fused: Tensor
    """[S] bool, on the CPU: positions whose text went through pre-fusion."""

    def common(self, other: "PromptKey") -> int:
        """How many positions at the beginning are the same."""
        if self.context != other.context:
            return 0
        length = min(len(self.ids), len(other.ids))
        differs = (self.ids[:length] != other.ids[:length]) | (self.fused[:length] != other.fused[:length])
        return int(differs.nonzero()[0]) if bool(differs.any()) else length

    def extended(self, ids: Sequence[int]) -> "PromptKey":
        """The key of the prompt with an answer behind it, which was not fused."""
        more = torch.tensor(ids, dtype=torch.long)
        fused = torch.cat([self.fused, torch.zeros(len(more), dtype=torch.bool)])
        return PromptKey(context=self.context, ids=torch.cat([self.ids, more]), fused=fused)


class PromptCache:
    """The latest prompts with their keys and values. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Make an empty cache.

        Args:
            max_bytes: Most bytes of keys and values, which stay on the model's device.

        Raises:
            ValueError: If the number is negative.
        """
        if max_bytes < 0:
            raise ValueError(f"A cache has room for 0 bytes or more, got max_bytes={max_bytes}.")
        self.max_bytes = max_bytes
        self._prompts: list[tuple[PromptKey, DynamicCache]] = []
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(_num_bytes(cache) for _, cache in self._prompts)

    def take(self, key: PromptKey) -> DynamicCache:
        """Take the keys and values of the longest beginning out of the cache, all but the prompt's last position.

        Without any, they are empty. Whoever takes them may add to them, and puts them back. Of a prompt that goes on
        much longer in another way the beginning is copied.
        """
        with self._lock:
            lengths = [key.common(other) for other, _ in self._prompts]
            best = max(range(len(lengths)), key=lengths.__getitem__, default=-1)
            if best < 0 or lengths[best] == 0:
                return DynamicCache()
            cache, length = self._prompts[best][1], min(lengths[best], len(key.ids) - 1)
            if cache.get_seq_length() - length > length:  # a conversation that may go on keeps its own
                cache = _beginning(cache, length)
            else:
                del self._prompts[best]
        _cut(cache, length)
        return cache

    def put(self, key: PromptKey, cache: DynamicCache) -> None:
        """Keep keys and values, of at most as many positions as the key has."""
        _cut(cache, len(key.ids))
        if _num_bytes(cache) > self.max_bytes:
            return
        with self._lock:
            self._prompts.append((key, cache))
            while self._prompts and self.num_bytes > self.max_bytes:
                del self._prompts[0]

    def clear(self) -> None:
        """Forget all prompts."""
        with self._lock:
            self._prompts.clear()


def _beginning(cache: DynamicCache, length: int) -> DynamicCache:
    """Copy the first positions."""
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        made.update(layer.keys[..., :length, :].clone(), layer.values[..., :length, :].clone(), index)
    return made


def _cut(cache: DynamicCache, length: int) -> None:
    """Keep at most the first ``length`` positions."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)


def _num_bytes(cache: DynamicCache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor))
