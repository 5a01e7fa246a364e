"""The task of both stages of the paper: answers about images, films and text, in the format of LLaVA.

Everything goes through ``model.fuse`` and then the unmodified language model. The loss is the mean over supervised
tokens; their number is the weight of a micro-batch, so that the loss of a step is the mean over all tokens of the step,
however its samples are divided among micro-batches and processes.

Shapes: B prompts, S spliced length, D language width, N supervised tokens.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llava_mini.data.tuning_batch import IGNORED, TuningBatch
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.training.idle_frames import seen_together, with_idle_frame
from llava_mini.training.trainer import Losses

ROWS_AT_A_TIME = 1024
"""Supervised tokens whose logits exist at a time: half a gigabyte in float32 with the 128,256 words of Llama 3.1."""


class MakeBatch(Protocol):
    """Micro-batches by number: ``TuningBatches``, or any other that can be pickled."""

    def __call__(self, index: int) -> TuningBatch:
        """Return micro-batch ``index``, counted over the whole run."""
        ...


class InstructionTask:
    """Answers in the format of LLaVA, for ``train_phase``."""

    def __init__(
        self,
        module: LlavaMiniForConditionalGeneration,
        make_batch: MakeBatch,
        *,
        is_spread: bool = False,
        has_features: bool = False,
    ) -> None:
        """Put model and data together.

        Args:
            module: The model; what of it trains is the business of a ``Stage``.
            make_batch: The micro-batches.
            is_spread: Whether several processes train, which have to run all parts equally often.
            has_features: Whether micro-batches may hold kept features in the place of pixels.
        """
        self.module = module
        self.make_batch = make_batch
        self.is_spread = is_spread
        self.has_features = has_features

    def weight(self, batch: TuningBatch) -> float:
        """Return the number of supervised tokens."""
        return float(batch.num_supervised)

    def losses(self, batch: TuningBatch) -> Losses:
        """Return the mean loss over the supervised tokens of a micro-batch, and the share that is right.

        Without any such token the model runs all the same, and the loss is 0: other processes may wait for it.
        """
        model, inputs = self.module, batch.inputs
        if inputs is None or self.is_spread or not _words_train(model):
            inputs = with_idle_frame(inputs, model.config, model.device)
        if self.is_spread and self.has_features:
            inputs = seen_together(inputs, model)
        fused = model.fuse(inputs)
        hidden = model.language_model.model(
            inputs_embeds=fused.inputs_embeds.to(model.dtype),
            attention_mask=fused.attention_mask,
            use_cache=False,
            **model.inside(fused),
        ).last_hidden_state  # [B, S, D]
        assert fused.labels is not None
        return answer_loss(model.get_output_embeddings(), hidden, fused.labels)


def _words_train(model: LlavaMiniForConditionalGeneration) -> bool:
    """Whether text alone teaches anything."""
    return any(parameter.requires_grad for parameter in model.language_model.parameters())


def answer_loss(head: nn.Module, hidden: Tensor, labels: Tensor, rows_at_a_time: int = ROWS_AT_A_TIME) -> Losses:
    """Return the mean cross entropy of the tokens that have a label, and the share that is right; 0 without any.

    Logits are made in the rows that need them only, some rows at a time, and again on the way back: the logits of a
    long prompt take more memory than all of its hidden states.

    Args:
        head: From hidden states to logits.
        hidden: [B, S, D], the last hidden states.
        labels: [B, S] int64, -100 where nothing is to be learned.
        rows_at_a_time: Most rows whose logits exist at the same time.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    rows, targets = hidden[:, :-1][chosen], targets[chosen]  # [N, D], [N]
    if not len(targets):
        return Losses(total=0.0 * head(hidden[:1, :1]).float().sum(), right={})
    total, right = hidden.new_zeros((), dtype=torch.float32), 0
    for some, wanted in zip(rows.split(rows_at_a_time), targets.split(rows_at_a_time), strict=True):
        if len(targets) > rows_at_a_time and torch.is_grad_enabled():
            loss, num_right = checkpoint(_sum, head, some, wanted, use_reentrant=False)
        else:
            loss, num_right = _sum(head, some, wanted)
        total, right = total + loss, right + num_right
    return Losses(total=total / len(targets), right={"tokens": float(right) / len(targets)})


def _sum(head: nn.Module, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and number of right tokens. rows: [N, D], targets: [N]."""
    logits = head(rows).float()  # [N, vocabulary]
    return functional.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
