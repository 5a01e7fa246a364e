"""The phases that train the whole path: alignment, stage 1 and stage 2.

Everything goes through the parts of ``model.fuse``, and then the unmodified language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from llava_mini.data.collate import Collator, TrainingBatch
from llava_mini.data.records import Record
from llava_mini.data.synthetic.charts import MAX_VALUE
from llava_mini.data.synthetic.drawing import LABEL_CLASSES, MAX_LETTERS
from llava_mini.data.synthetic.scenes import (
    CHARACTERS,
    COLOURS,
    SHAPES,
    SIZES,
    WORDS,
    SceneSettings,
    random_scene,
)
from llava_mini.data.synthetic.splits import generator_of
from llava_mini.flow import FusedPrompt, ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.positions import sine_cosine_2d
from llava_mini.training.auxiliary import ThingHeads
from llava_mini.training.distillation import distillation_loss, taught_logits
from llava_mini.training.language_pretraining import answer_loss, row_loss
from llava_mini.training.reconstruction import PatchDecoder, tokens_of_frames
from llava_mini.training.shared_frames import fuse_shared, supervised_rows
from llava_mini.training.trainer import Losses
from llava_mini.training.vision_pretraining import labelled, normalised

RecordsOf = Callable[[int], Sequence[Record]]
"""The records of a step."""


@dataclass(frozen=True, kw_only=True)
class AlignmentBatch:
    """Pictures and where their patches should lie after projection."""

    pixel_values: Tensor
    """[F, 1, 3, H, W], normalised."""
    targets: Tensor
    """[F, P, D] float32: the codes of places, and the embeddings of words and letters for what a patch shows."""
    shown: Tensor
    """[F, P] bool: patches that show something."""


@dataclass(frozen=True, kw_only=True)
class AlignmentBatches:
    """The pictures of each step, and where their patches should lie."""

    words: dict[str, Tensor]
    """[1 + values, D] for each label: 0 for nothing, then the embedding of the word, or the code, for each value."""
    places: Tensor
    """[P, D]: the code of each place."""
    batch_size: int
    settings: SceneSettings
    patch_size: int

    def __call__(self, step: int) -> AlignmentBatch:
        """Return the pictures of a step and where their patches should lie."""
        first = step * self.batch_size
        scenes = [
            random_scene(generator_of("train", index, "alignment"), self.settings)
            for index in range(first, first + self.batch_size)
        ]
        pictures = labelled(scenes, self.patch_size)
        labels = pictures.labels
        meanings = [words[labels[name]] for name, words in self.words.items()]  # [names] of [F, P, D]
        return AlignmentBatch(
            pixel_values=normalised(pictures.pixels, torch.float32)[:, None],
            targets=self.places + torch.stack(meanings).sum(0),  # [F, P, D]
            shown=(labels["shape"] > 0) | (labels["character"] > 0),
        )


class Alignment:
    """The task of alignment: projected patches come to lie where the words for them lie.

    It stands in for the text alignment that a CLIP encoder has from its own training. Only the
    projector moves; the words are the frozen input embeddings of the language model. To the words comes a
    code of the place of the patch, as long as a word: fitted to words alone, patches forget where they are. A thing's
    patches share codes of its centre besides, which tell it from others like it. What is
    written counts as a word, if it is one, and as its letters one by one: each is the embedding of the letter with its
    entries moved on by as many as its place in the text says, so that 47 and 74 differ.
    """

    def __init__(
        self,
        model: LlavaMiniForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        settings: SceneSettings,
    ) -> None:
        """Prepare the words.

        Args:
            model: Its vision tower, projector and word embeddings are used.
            tokenizer: Of the language model.
            batch_size: Pictures of a step.
            settings: What the pictures hold.
        """
        self.module = model
        table = embedding_table(model).float()
        words = {
            "shape": _embedded(table, tokenizer, (*SHAPES, "bar")),
            "colour": _embedded(table, tokenizer, tuple(COLOURS)),
            "size": _embedded(table, tokenizer, tuple(SIZES)),
            "value": _embedded(table, tokenizer, tuple(str(value) for value in range(1, MAX_VALUE + 1))),
            "word": _embedded(table, tokenizer, WORDS),
            "character": _embedded(table, tokenizer, tuple(CHARACTERS.lower())),
        }
        for place in range(1, 1 + MAX_LETTERS):
            shift = place * table.shape[1] // (1 + MAX_LETTERS)
            words[f"letter {place}"] = words["character"].roll(shift, dims=-1)
        length = words["shape"][1:].norm(dim=-1).mean()
        places = length * functional.normalize(sine_cosine_2d(model.config.patches_per_side, table.shape[1]), dim=-1)
        columns, rows = _line_codes(table.shape[1])
        words |= {
            name: length * functional.pad(codes, (0, 0, 1, 0)) for name, codes in (("column", columns), ("row", rows))
        }
        self.make_batch = AlignmentBatches(
            words=words,
            places=places,
            batch_size=batch_size,
            settings=settings,
            patch_size=model.config.patch_size,
        )

    def losses(self, batch: AlignmentBatch) -> Losses:
        """Return the squared distance to the targets, as a share of their own square."""
        targets, shown = batch.targets, batch.shown
        with torch.no_grad():
            features = self.module.encode_frames(batch.pixel_values.to(self.module.dtype))[:, 0]  # [F, P, E]
        distance = (self.module.projector(features).float() - targets).square().sum(-1)  # [F, P]
        scale = targets[shown].square().sum(-1).mean()
        total = distance[shown].mean() / scale + 0.2 * distance[~shown].mean() / scale
        return Losses(total=total, parts={"shown": float(distance[shown].mean().detach() / scale)})


class TunedModel(nn.Module):
    """A model together with the heads that only training needs."""

    def __init__(self, model: LlavaMiniForConditionalGeneration, *, tells_patches: bool = False) -> None:
        """Add fresh heads to a model, and a decoder of patches if one is wanted."""
        super().__init__()
        self.model = model
        num_values = {"colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES)}
        width, side = model.config.text.hidden_size, model.config.patches_per_side
        self.thing_heads = ThingHeads(width, num_values).to(model.dtype)
        self.patch_decoder = None
        if tells_patches:
            self.patch_decoder = PatchDecoder(width, model.config.vision.hidden_size, side).to(model.dtype)


@dataclass(frozen=True, kw_only=True)
class RecordBatches:
    """The records of each step as tensors."""

    collator: Collator
    records_of: RecordsOf
    conversation_every: int

    def __call__(self, step: int) -> TrainingBatch:
        """Return the batch of a step."""
        talks = self.conversation_every > 0 and step % self.conversation_every == 0
        return self.collator(self.records_of(step), separate=not talks)


class InstructionTuning:
    """The task of stages 1 and 2: answers about images and clips, with losses on things if they have a weight."""

    def __init__(
        self,
        module: TunedModel,
        collator: Collator,
        records_of: RecordsOf,
        *,
        thing_weight: float,
        patch_weight: float = 0.0,
        teacher: LlavaMiniForConditionalGeneration | None = None,
        conversation_every: int = 1,
    ) -> None:
        """Put the parts together.

        Args:
            module: The model with its heads.
            collator: From records to tensors.
            records_of: The records of a step.
            thing_weight: Weight of each loss on things against the answer loss; 0 leaves them out.
            patch_weight: Weight of the loss on patches, for a module that tells them; 0 leaves it out.
            teacher: A frozen model whose answers are learned, too, see ``training.distillation``.
            conversation_every: In one of so many steps the turns of a record are one conversation; in the
                others every question is a prompt of its own. 0: in all of them.
        """
        if teacher is not None and thing_weight:
            raise ValueError("A teacher goes without losses on things. Give one of them.")
        self.module = module
        self.collator = collator
        self.make_batch = RecordBatches(collator=collator, records_of=records_of, conversation_every=conversation_every)
        self.thing_weight = thing_weight
        self.patch_weight = patch_weight
        self.teacher = teacher

    def losses(self, batch: TrainingBatch) -> Losses:
        """Return the losses on the records of a step."""
        if (self.patch_weight or self.teacher is not None) and batch.inputs.features is None:
            batch = replace(batch, inputs=with_features(self.module.model, batch.inputs))
        fused = fuse_shared(self.module.model, batch.inputs, batch.frame_sources)
        if self.teacher is None:
            losses = tuning_losses(self.module, batch, fused, self.thing_weight)
        else:
            losses = self._taught(self.teacher, batch, fused)
        if self.patch_weight == 0:
            return losses
        return _with(losses, "patches", self._patch_loss(batch, fused), self.patch_weight)

    def _taught(self, teacher: LlavaMiniForConditionalGeneration, batch: TrainingBatch, fused: FusedPrompt) -> Losses:
        """The answer loss, and the distance to what the teacher answers."""
        model = self.module.model
        head, tokens_per_frame = model.language_model.lm_head, model.config.tokens_per_frame
        rows, targets = supervised_rows(model, fused, batch.frame_sources)
        nn.Module.to(teacher, rows.device)
        taught = taught_logits(teacher, batch.inputs, batch.frame_sources, tokens_per_frame)
        return _with(row_loss(head, rows, targets), "teacher", distillation_loss(head(rows).float(), taught))

    def _patch_loss(self, batch: TrainingBatch, fused: FusedPrompt) -> Tensor:
        features, decoder, config = batch.inputs.features, self.module.patch_decoder, self.module.model.config
        assert features is not None
        assert decoder is not None, "The module tells no patches."
        sources, tokens = tokens_of_frames(fused, int(config.image_token_id or 0), batch.frame_sources)
        patches = features[sources, -1, :, : config.vision.hidden_size]  # of the whole image
        return decoder.loss(tokens.to(self.module.model.dtype), patches)


def _with(losses: Losses, name: str, loss: Tensor, weight: float = 1.0) -> Losses:
    """Losses and one more at its weight."""
    parts = losses.parts or {"answer": float(losses.total.detach())}
    return replace(losses, total=losses.total + weight * loss, parts={**parts, name: float(loss.detach())})


def with_features(model: LlavaMiniForConditionalGeneration, inputs: ModelInputs) -> ModelInputs:
    """Put what the frozen vision tower says of all frames in the place of their pixels."""
    assert isinstance(inputs.pixel_values, Tensor)
    with torch.no_grad():
        # As they come from a file: features with other strides are rounded otherwise further on.
        return replace(inputs, pixel_values=None, features=model.encode_frames(inputs.pixel_values).contiguous())


def tuning_losses(module: TunedModel, batch: TrainingBatch, fused: FusedPrompt, thing_weight: float) -> Losses:
    """Return the answer loss on fused prompts, with the losses on things added at their weight."""
    model = module.model
    if thing_weight == 0:
        return row_loss(model.language_model.lm_head, *supervised_rows(model, fused, batch.frame_sources))
    output = model.language_model.model(
        inputs_embeds=fused.inputs_embeds.to(model.dtype),
        attention_mask=fused.attention_mask,
        output_hidden_states=True,
        **model.inside(fused),
    )
    assert fused.labels is not None
    answers = answer_loss(model.language_model.lm_head, output.last_hidden_state, fused.labels)
    heads = module.thing_heads
    words = embedding_table(model)[batch.frame_things.names].mean(1)  # [M, D]
    noun = heads.noun_loss(fused.inputs_embeds, batch.nouns)
    frame = heads.frame_loss(fused.inputs_embeds, words, batch.frame_things)
    clip = heads.clip_loss(output.hidden_states[-2], batch.clip_nouns)
    change = heads.change_loss(output.hidden_states[len(output.hidden_states) // 2], batch.frame_changes)
    shown = heads.shown_loss(fused.inputs_embeds, batch.shown_things)
    losses = {"noun": noun, "frame": frame, "clip": clip, "shown": shown, "change": change}
    asked = {
        "noun": batch.nouns.tokens,
        "frame": batch.frame_things.tokens,
        "clip": batch.clip_nouns.tokens,
        "shown": batch.shown_things.tokens,
        "change": batch.frame_changes.tokens,
    }
    parts = {"answer": answers.total} | {name: loss for name, loss in losses.items() if len(asked[name])}
    return Losses(
        total=answers.total + thing_weight * torch.stack(tuple(losses.values())).sum(),
        parts={name: float(loss.detach()) for name, loss in parts.items()},
        right=answers.right,
    )


def embedding_table(model: LlavaMiniForConditionalGeneration) -> Tensor:
    """Return the input embeddings of the language model, without a gradient: [vocabulary, D]."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.weight.detach()


def _line_codes(width: int) -> tuple[Tensor, Tensor]:
    """Return codes of length 1 of columns and of rows, [places, width] each, unlike those of the places of patches."""
    places = LABEL_CLASSES["column"] - 1
    codes = sine_cosine_2d(places, width).view(places, places, width)
    columns, rows = codes[0].clone(), codes[:, 0].clone()
    columns[:, width // 2 :], rows[:, : width // 2] = 0, 0
    rolled = (codes.roll(width // 3, dims=-1) for codes in (columns, rows))
    columns, rows = (functional.normalize(codes, dim=-1) for codes in rolled)
    return columns, rows


def _embedded(table: Tensor, tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> Tensor:
    """Return 0 for nothing, then the mean embedding of each word: [1 + words, D]."""
    rows = [table[tokenizer.encode(f" {word}", add_special_tokens=False)].mean(0) for word in words]
    return torch.stack([torch.zeros_like(rows[0]), *rows])
