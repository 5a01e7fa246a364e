"""How weights and gradients are spread over the processes: PyTorch's ``fully_shard``, layer by layer.

    none   for one process; with one, the others are the same
    ddp    every process holds everything and computes on its own batches; gradients are averaged over all
    fsdp   every process holds a part of every tensor; a layer is put together when it runs and parted again after

``ddp`` is ``fully_shard`` on a mesh that replicates over all processes and shards over one: the scheme of
DistributedDataParallel, with the mixed precision, accumulation and checkpoints of ``fsdp``. In both, what trains is
kept in float32 and computed with in the number format that the module came in, and gradients are summed in float32.

All processes have to call the same layers equally often, or they wait for one another forever. A micro-batch without
frames therefore gets one that teaches nothing (``idle_frames.py``), and all frames pass at once.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import CLIPVisionModel, PreTrainedModel

from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.projector import Projector
from llava_mini.training.stages import Stage, apply_stage
from llava_mini.training.world import World

Strategy = Literal["none", "ddp", "fsdp"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
"""Kernels, by their names in transformers."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a phase is computed. None of it changes what is learned, but for rounding."""

    strategy: Strategy = "none"
    """What every process holds: see the top of this file."""
    checkpoint_activations: bool = False
    """Keep the inputs of layers only, and compute the rest again on the way back."""
    compile_layers: bool = False
    """Compile each layer with ``torch.compile``. The first steps take long."""
    attention: Attention | None = None
    """Kernel of language model and pre-fusion. None: as the module comes, in fused kernels on a GPU."""

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy is {self.strategy!r}; choose one of {', '.join(get_args(Strategy))}.")
        if self.attention not in (None, *get_args(Attention)):
            raise ValueError(f"attention is {self.attention!r}; choose one of {', '.join(get_args(Attention))}.")


class Forward(nn.Module):
    """The losses of a task as the forward pass of one module, around which ``fully_shard`` puts its hooks."""

    def __init__(self, task: Any) -> None:
        """Wrap a task of ``trainer.Task``."""
        super().__init__()
        self.module: nn.Module = task.module
        self._losses_of = task.losses  # not the task, which may be a module itself
        self.losses: Any = None
        """Of the last call."""

    def forward(self, batch: Any) -> Tensor:
        """Return the total of the losses on a batch."""
        self.losses = self._losses_of(batch)
        return self.losses.total


def prepare(task: Any, stage: Stage, settings: EngineSettings, world: World) -> Forward:
    """Freeze, spread, and set up what a stage trains; the module of the task is changed in place.

    Args:
        task: Its module lies on any device, with the same sizes in every process; the weights of rank 0 count.
        stage: What trains.
        settings: How.
        world: The processes.

    Raises:
        ValueError: If several processes have no strategy, the rules do not fit the parameters, or activations cannot
            be recomputed.
    """
    if world.size > 1 and settings.strategy == "none":
        raise ValueError(
            f"{world.size} processes need a strategy: 'ddp' for a model that fits on each device with its optimizer, "
            "'fsdp' for any other."
        )
    apply_stage(task.module.named_parameters(), stage)
    if settings.attention is not None:
        _set_attention(task.module, settings.attention)
    if settings.checkpoint_activations:
        checkpoint_activations(task.module)
    if settings.compile_layers:
        for layer in layers_of(task.module):
            layer.compile()
    forward = Forward(task)
    if world.size > 1:
        _shard(forward, settings.strategy, world)
    return forward


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Return the parts that run and are spread as one: what their models say must not be split, and projectors.

    Whole transformers models are never among them: they lose track of their hidden states when their class is replaced.
    """
    names = {
        name
        for part in module.modules()
        if isinstance(part, PreTrainedModel)
        for name in cast(Iterator[str], part._no_split_modules or ())
    }
    return list(_topmost(module, {*names, Projector.__name__}))


def set_accumulating(forward: Forward, strategy: Strategy, *, is_last: bool) -> None:
    """Say whether more micro-batches follow before the update, so that gradients can wait with their journey."""
    if strategy == "ddp" and isinstance(forward, FSDPModule):
        cast(FSDPModule, forward).set_requires_all_reduce(is_last)


def _topmost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        splits = isinstance(child, PreTrainedModel) or not any(True for _ in child.parameters())
        if type(child).__name__ in names and not splits:
            yield child
        else:
            yield from _topmost(child, names)


def _shard(forward: Forward, strategy: Strategy, world: World) -> None:
    for part in forward.modules():
        if isinstance(part, LlavaMiniForConditionalGeneration):
            part.frames_per_pass = sys.maxsize  # as many passes in every process
    # Nothing changes what a layer returned in place: what is warned of cannot happen.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    shape = (world.size, 1) if strategy == "ddp" else (world.size,)
    names = ("replicate", "shard") if strategy == "ddp" else ("shard",)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    computed = _dtype_of(forward)
    policy = MixedPrecisionPolicy(
        param_dtype=None if computed == torch.float32 else computed, reduce_dtype=torch.float32
    )
    for unit in (*layers_of(forward.module), forward):
        _share_weights(unit, world)
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def _set_attention(module: nn.Module, kernel: Attention) -> None:
    for part in module.modules():
        if isinstance(part, LlavaMiniForConditionalGeneration):
            part.language_model.set_attn_implementation(kernel)  # pre-fusion shares its configuration


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Return the number format of what trains.

    Raises:
        ValueError: If there are several.
    """
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if len(dtypes) != 1:
        raise ValueError(
            f"What trains comes in several number formats: {', '.join(sorted(map(str, dtypes))) or 'none at all'}. "
            "Bring the module into one before training."
        )
    return dtypes.pop()


def _share_weights(unit: nn.Module, world: World) -> None:
    """Bring what is not spread yet to the device, what trains into float32, and give all the weights of rank 0."""
    for part in unit.modules():
        for parameter in part.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            dtype = torch.float32 if parameter.requires_grad else parameter.dtype
            parameter.data = parameter.data.to(world.device, dtype).contiguous()
            distributed.broadcast(parameter.data, src=0)
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to(world.device), persistent=name not in part._non_persistent_buffers_set)
            distributed.broadcast(part.get_buffer(name), src=0)


def checkpoint_activations(module: nn.Module) -> None:
    """Let the transformers models in a module keep the inputs of their layers only.

    Raises:
        ValueError: There is none that can.
    """
    able = list(_outermost_models(module))
    if not able:
        raise ValueError(
            "checkpoint_activations needs a transformers model that can recompute its layers; this module holds none."
        )
    for model in able:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name
        enable({"use_reentrant": False})
        # transformers makes embeddings ask for gradients, for another kind of recomputing. Those of pictures would
        # drag a frozen vision tower through the way back.
        model.disable_input_require_grads()
        for part in model.modules():
            if isinstance(part, CLIPVisionModel) and not any(one.requires_grad for one in part.parameters()):
                part.gradient_checkpointing_disable()  # keeps nothing anyway, and compiled layers cannot have it so


def _outermost_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the transformers models that can recompute their layers, and none that lie in another."""
    if isinstance(module, PreTrainedModel) and module.supports_gradient_checkpointing:
        yield module
        return
    for child in module.children():
        yield from _outermost_models(child)
