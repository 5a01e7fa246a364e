"""AdamW for weights of any precision, with float32 master copies, and the rate over time.

With bfloat16 weights a step of 0.001 of a weight would be rounded away; the master copies keep it. Weights that are
float32 are their own masters. All of them may be spread over processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_mini.training.stages import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, under its names."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How parameters are updated."""

    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    """Decay of matrices; vectors (norms, biases) and embeddings of one row are not decayed."""
    max_gradient_norm: float = 1.0
    """Gradients of all parameters together are shortened to this length."""
    warmup_share: float = 0.03
    """Share of the steps in which the rate rises linearly."""
    final_share: float = 0.02
    """What is left of the peak rate at the last step, after a cosine."""


def rate_share(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """Return the share of the peak rate at a step, counted from 0: linear warm-up, then a cosine."""
    warmup = max(round(settings.warmup_share * num_steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup + 1) / max(num_steps - warmup, 1), 1.0)
    return settings.final_share + (1 - settings.final_share) * 0.5 * (1 + cos(pi * progress))


class MasterAdamW:
    """AdamW that updates float32 masters and writes them back to the model's weights."""

    def __init__(self, groups: Sequence[ParameterGroup], settings: OptimizerSettings) -> None:
        """Take the parameters, and float32 copies of those in other number formats.

        Args:
            groups: Parameters by peak rate, from ``apply_stage``.
            settings: How to update.

        Raises:
            ValueError: If no parameter is to be trained.
        """
        if not groups:
            raise ValueError("No parameter is to be trained: every rule of the stage is frozen.")
        self.settings = settings
        self.names: list[str] = []
        self.weights: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        adam_groups = []
        for group in groups:
            for decayed in (True, False):
                masters = []
                for name, weight in zip(group.names, group.parameters, strict=True):
                    if (weight.ndim >= 2 and weight.shape[0] > 1) != decayed:
                        continue
                    master = weight.detach().float()
                    self.names.append(name)
                    self.weights.append(weight)
                    self.masters.append(master)
                    masters.append(master)
                decay = settings.weight_decay if decayed else 0.0
                if masters:
                    adam_groups.append({"params": masters, "lr": group.rate, "peak": group.rate, "weight_decay": decay})
        self.adam = torch.optim.AdamW(adam_groups, betas=settings.betas, foreach=True)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to sums in float32. Those of float32 weights are such sums already."""
        for weight, master in self._copied():
            if weight.grad is None:
                continue
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None

    def step(self, share: float) -> float:
        """Clip the gradients, update unless they are not finite, and clear them.

        Args:
            share: Share of the peak rate to use.

        Returns:
            The length of all gradients together, before clipping.
        """
        self.collect()
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * share
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = nn.utils.clip_grad_norm_(self.masters, self.settings.max_gradient_norm, foreach=True)
        length = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(length):
            self.adam.step()
            self.write_back()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.grad = None
            master.grad = None
        return length

    def write_back(self) -> None:
        """Round the masters to the weights that are copies of them."""
        with torch.no_grad():
            for weight, master in self._copied():
                weight.copy_(master)

    def moments(self) -> dict[str, Tensor]:
        """Return the moments by name, made with zeros before the first step: to be stored, or to be read into."""
        tensors: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            state = self.adam.state[master]
            if not state:
                state.update({"step": torch.tensor(0.0), **{key: torch.zeros_like(master) for key in MOMENTS}})
            tensors |= {f"{key}.{name}": state[key] for key in MOMENTS}
        return tensors

    def go_on(self, step: int) -> None:
        """Continue after so many steps, once masters and moments have been read into."""
        for master in self.masters:
            self.adam.state[master]["step"].fill_(step)
        self.write_back()

    def _copied(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the weights that are not their own masters."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.dtype != torch.float32:
                yield weight, master
