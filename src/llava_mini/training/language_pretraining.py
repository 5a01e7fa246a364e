"""Training a small language model from nothing, on questions about described pictures.

LLaVA starts from a language model that can answer questions. The stand-in here reads the description
of a scene in words, then questions about it, and learns to answer: the skills that the vision side
later feeds with what it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from llava_mini.data.collate import LENGTH_STEP
from llava_mini.data.records import Turn
from llava_mini.data.synthetic.world import WorldSettings, world_item
from llava_mini.data.tokenizer import ASSISTANT, BEGIN, END, USER
from llava_mini.training.trainer import Losses

EMBEDDING_SCALE = 1.0
"""Standard deviation of a fresh word embedding.

Pre-fusion hands its hidden states to the language model in the place of embeddings. With the usual 0.02 they are 50
times as long as the embeddings that its layers learned to add to, and these layers hardly change them: with small
embeddings stage 2 learned next to nothing in a thousand steps.
"""


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Conversations as ids, padded on the right."""

    input_ids: Tensor
    """[B, T] int64."""
    attention_mask: Tensor
    """[B, T], 0 at padding."""
    labels: Tensor
    """[B, T] int64, -100 where nothing is to be learned."""


@dataclass(frozen=True, kw_only=True)
class LanguageBatches:
    """The conversations of each step."""

    tokenizer: PreTrainedTokenizerFast
    batch_size: int
    settings: WorldSettings

    def __call__(self, step: int) -> TextBatch:
        """Return the conversations of a step."""
        first = step * self.batch_size
        items = [
            world_item("train", index, self.settings, "language") for index in range(first, first + self.batch_size)
        ]
        return text_batch(self.tokenizer, [(item.description, item.turns) for item in items])


class LanguagePretraining:
    """The task of the second phase: answers to questions about descriptions."""

    def __init__(
        self,
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        dtype: torch.dtype,
        settings: WorldSettings,
    ) -> None:
        """Make the model.

        Args:
            config: Sizes of the language model.
            tokenizer: What the texts are encoded with.
            batch_size: Conversations of a step.
            dtype: Precision of weights and arithmetic.
            settings: What the questions are about.
        """
        self.module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            self.module.get_input_embeddings().weight.normal_(std=EMBEDDING_SCALE)
        self.make_batch = LanguageBatches(tokenizer=tokenizer, batch_size=batch_size, settings=settings)

    def losses(self, batch: TextBatch) -> Losses:
        """Return the loss on the answers of a step, and the share of answer tokens that are right."""
        hidden = self.module.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return answer_loss(self.module.lm_head, hidden, batch.labels)


def answer_loss(head: torch.nn.Module, hidden: Tensor, labels: Tensor) -> Losses:
    """Return the mean cross entropy of the tokens that have a label, and the share that is right.

    Logits are computed in the rows that need them only.

    Args:
        head: From hidden states to logits.
        hidden: [B, T, D], the last hidden states.
        labels: [B, T] int64, -100 where nothing is to be learned.
    """
    targets = labels[:, 1:]
    chosen = targets != -100
    return row_loss(head, hidden[:, :-1][chosen], targets[chosen])


def row_loss(head: torch.nn.Module, rows: Tensor, targets: Tensor) -> Losses:
    """Return the same for rows [N, D] and the tokens [N] that follow them."""
    logits = head(rows).float()  # [N, vocabulary]
    right = float((logits.argmax(-1) == targets).float().mean())
    return Losses(total=functional.cross_entropy(logits, targets), right={"tokens": right})


def text_batch(tokenizer: PreTrainedTokenizerFast, talks: Sequence[tuple[str, Sequence[Turn]]]) -> TextBatch:
    """Encode conversations about descriptions; only answers and their end have labels.

    Args:
        tokenizer: Has the control tokens of ``data.tokenizer``.
        talks: A description with the turns about it, for each conversation.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for description, turns in talks:
        ids, labels = [], []
        for number, turn in enumerate(turns):
            opening = f"{BEGIN}{USER}\n{description}\n" if number == 0 else f"\n{USER}\n"
            asked = tokenizer.encode(f"{opening}{turn.question}{END}\n{ASSISTANT}\n", add_special_tokens=False)
            answer = tokenizer.encode(f"{turn.answer}{END}", add_special_tokens=False)
            ids += asked + answer
            labels += [-100] * len(asked) + answer
        rows.append((ids, labels))
    length = -(-max(len(ids) for ids, _ in rows) // LENGTH_STEP) * LENGTH_STEP
    pad = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
    return TextBatch(
        input_ids=torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        labels=torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    )
