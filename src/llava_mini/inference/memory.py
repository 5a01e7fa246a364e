"""Whether a model fits, known before any weight is read.

The weights are counted on the model built without memory (torch's meta device); the working set is
what the largest step on the way holds at once, counted from the configuration.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_mini.config import LlavaMiniConfig
from llava_mini.inference.quantization import quantized_weights
from llava_mini.model.cost import keys_values_bytes_per_token, prefusion_bytes_per_frame
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration

PROMPT_TOKENS = 2048
"""Length of the prompt that the working set is counted for."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes on the device while a question is answered."""

    weights: int
    """All parameters in their number formats."""
    working: int
    """The most that vision tower, pre-fusion or language model hold at a time, and keys and values: of a prompt in the
    language model, of the frames of one pass in pre-fusion."""

    @property
    def total(self) -> int:
        """Weights and working set."""
        return self.weights + self.working


def meta_model(config: LlavaMiniConfig) -> LlavaMiniForConditionalGeneration:
    """The model without its weights: names and shapes of everything, in no memory."""
    with torch.device("meta"):
        return LlavaMiniForConditionalGeneration(config)


def memory_need(
    model: LlavaMiniForConditionalGeneration, dtype: torch.dtype, quantization: str | None = None, *, frames: int = 1
) -> MemoryNeed:
    """What ``model``, which may be on the meta device, needs with ``frames`` frames at a time."""
    eight_bit = quantized_weights(model) if quantization is not None else set()
    weights = sum(
        parameter.numel() * (1 if name in eight_bit else dtype.itemsize) for name, parameter in model.named_parameters()
    )
    config, vision, text = model.config, model.config.vision, model.config.text
    patches = frames * config.patches_per_frame
    rows = max(patches + frames * (config.tokens_per_frame + 64), PROMPT_TOKENS)  # some text with each frame
    # For each row: input, attention's query, keys, values and output, and what the MLP holds.
    largest = max(
        patches * (5 * vision.hidden_size + 2 * vision.intermediate_size),
        rows * (5 * text.hidden_size + 3 * text.intermediate_size),
    )
    format_name = str(dtype).removeprefix("torch.")
    keys_values = PROMPT_TOKENS * keys_values_bytes_per_token(config, format_name)
    keys_values += frames * prefusion_bytes_per_frame(config, format_name)
    return MemoryNeed(weights=weights, working=largest * dtype.itemsize + keys_values)


def fitting_frames(
    model: LlavaMiniForConditionalGeneration, dtype: torch.dtype, quantization: str | None, available: int | None
) -> int:
    """How many frames may go through the model at a time: its own number, halved until they fit, at least 1."""
    frames = model.frames_per_pass
    while available is not None and frames > 1:
        if memory_need(model, dtype, quantization, frames=frames).total <= available:
            break
        frames //= 2
    return frames


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on ``device``. None: the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = [free for free in (_free_by_system(), _free_by_cgroup()) if free is not None]
    return min(limits, default=None)


def check_memory(
    name: str, need: MemoryNeed, available: int | None, choice: str, others: Mapping[str, MemoryNeed]
) -> None:
    """Refuse a model that cannot fit.

    Args:
        name: the model, as the user called it.
        need: what it needs as chosen.
        available: what there is. None: unknown, so nothing is refused.
        choice: device and number format, in words.
        others: what else could be chosen, in words, with its need.

    Raises:
        ValueError: it does not fit; the message names what would help.
    """
    if available is None or need.total <= available:
        return
    smaller = [
        f"{words} ({_gigabytes(other.total)}{'' if other.total <= available else ', still too much'})"
        for words, other in others.items()
        if other.total < need.total
    ]
    options = "; ".join([*smaller, "another device; a smaller model"])
    raise ValueError(
        f"The model {name!r} needs about {_gigabytes(need.total)} ({_gigabytes(need.weights)} of weights) on {choice}, "
        f"but {_gigabytes(available)} are free. Options: {options}."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _free_by_system() -> int | None:
    """What the operating system could give without swapping; its whole memory where it does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_by_cgroup() -> int | None:
    """What a container may still take: its limit less what it holds, files that can be dropped not counted."""
    for folder, limit, used, droppable in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, held = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit():
            return max(int(most) - held + int(stat.get(droppable, 0)), 0)
    return None
