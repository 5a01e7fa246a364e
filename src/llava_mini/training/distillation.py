"""Learning what another model would answer: one with all patches teaches one with a single token a frame.

The teacher is frozen and sees the same prompts and the same features of frames. Beside the answer itself the pupil
learns the teacher's probabilities of every word in its place (Hinton et al., arXiv 1503.02531), which needs no label
that a data set lacks. ETC (arXiv 2606.00543) distils single tokens, too, in a way of its own.

Shapes: B prompts, T tokens, N supervised tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.training.shared_frames import fuse_shared, supervised_rows


@torch.no_grad()
def taught_logits(
    teacher: LlavaMiniForConditionalGeneration, inputs: ModelInputs, frame_sources: Tensor, tokens_per_frame: int
) -> Tensor:
    """Return the logits [N, vocabulary], float32, that a teacher gives supervised tokens, in the order of the prompts.

    Args:
        teacher: In evaluation mode, with the pupil's tokenizer and vision tower.
        inputs: The pupil's, with ``labels`` and ``features``.
        frame_sources: As in ``fuse_shared``.
        tokens_per_frame: The pupil's.

    Raises:
        ValueError: The teacher's tokens of a frame are not a multiple of the pupil's.
    """
    copies, rest = divmod(teacher.config.tokens_per_frame, tokens_per_frame)
    if rest:
        raise ValueError(
            f"A teacher with {teacher.config.tokens_per_frame} tokens a frame cannot read the prompts of a model with "
            f"{tokens_per_frame}. Choose a teacher whose tokens are a multiple, such as one with all patches."
        )
    fused = fuse_shared(teacher, with_copies(inputs, int(teacher.config.image_token_id or 0), copies), frame_sources)
    return teacher.language_model.lm_head(supervised_rows(teacher, fused, frame_sources)[0]).float()


def distillation_loss(logits: Tensor, taught: Tensor) -> Tensor:
    """Return the mean divergence of logits [N, vocabulary] from those of a teacher."""
    return functional.kl_div(logits.log_softmax(-1), taught.log_softmax(-1), reduction="batchmean", log_target=True)


def with_copies(inputs: ModelInputs, image_token_id: int, copies: int) -> ModelInputs:
    """Return prompts [B, T] padded on the right, in which each vision token stands so many times."""
    assert inputs.labels is not None
    repeats = torch.where(inputs.input_ids == image_token_id, copies, 1)

    def widened(values: Tensor | None, padding: int) -> Tensor | None:
        if values is None:
            return None
        rows = [row.repeat_interleave(times) for row, times in zip(values, repeats, strict=True)]
        return pad_sequence(rows, batch_first=True, padding_value=padding)

    ids = widened(inputs.input_ids, 0)
    assert ids is not None
    return replace(
        inputs,
        input_ids=ids,
        attention_mask=widened(inputs.attention_mask, 0),
        answer_mask=widened(inputs.answer_mask, 0),
        labels=widened(inputs.labels, -100),
    )
