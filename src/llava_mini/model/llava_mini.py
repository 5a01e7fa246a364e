"""LLaVA-Mini: the whole path from pixels and ids to logits.

    pixels -> vision tower -> reducer, projector -> pre-fusion -> splice -> language model

``fuse`` does all but the last step. What it returns can be continued by any causal language model,
which stays as transformers wrote it (paper, appendix E.3); a reducer that acts inside it has more to say (``inside``).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, CLIPVisionModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import FrameChunk, FusedPrompt, KeysValues, ModelInputs, SeenChunk, SeenFrames
from llava_mini.model import inside as insides
from llava_mini.model import splice
from llava_mini.model.assistance import refuse_assistance
from llava_mini.model.head import read_whole
from llava_mini.model.headless import Headless
from llava_mini.model.prefusion import Fused, Prefusion
from llava_mini.model.pretrained import StrictPreTrainedModel
from llava_mini.model.projector import build_projector
from llava_mini.model.reducers import REDUCERS, Question, Reduced, Reducer, build_reducer
from llava_mini.model.streamed import StreamedFusion
from llava_mini.model.vision import encode_views, join_crops


class LlavaMiniForConditionalGeneration(StrictPreTrainedModel, GenerationMixin):
    """LLaVA-Mini with a language model head."""

    config_class = LlavaMiniConfig
    config: LlavaMiniConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "PrefusionLayer", *(one.__name__ for one in REDUCERS.values())]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    frames_per_pass: int = 16
    """Frames that go through vision, reduction and pre-fusion at a time: memory against speed, never the result."""

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__(config)
        self.vision_tower: CLIPVisionModel = CLIPVisionModel._from_config(config.vision)
        self.reducer = build_reducer(config)
        self.projector = build_projector(
            config.vision.hidden_size, config.text.hidden_size, is_linear=self.reducer.has_linear_projector
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text)
        read_whole(self.language_model.get_output_embeddings())
        config.text_config = self.language_model.config  # one object, so that a changed attention kernel reaches all
        self.prefusion = Prefusion(config.text, config.prefusion_num_layers) if config.prefusion_num_layers else None
        if self.prefusion is not None and self.reducer.is_late:
            raise ValueError(
                f"The reducer {config.reducer!r} needs the question, or gives frames different numbers of tokens, so "
                "pre-fusion, which sees frames before any question, cannot follow it. Set prefusion_num_layers=0."
            )
        insides.let_in(self.reducer, self.language_model, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Reducer):
            module.init_weights()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's table."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's table."""
        self.language_model.set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the language model's table, but not over the id that marks the places of frames.

        Raises:
            ValueError: the new table would have a row for ``image_token_id``.
        """
        image_token_id = cast(int, self.config.image_token_id)
        if new_num_tokens is not None and new_num_tokens > image_token_id:
            raise ValueError(
                f"A table of {new_num_tokens} tokens would make a word of image_token_id {image_token_id}, which marks "
                "the places of frames. Give the configuration a larger image_token_id first."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    @property
    def base_model(self) -> Headless:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model without its head, which TRL asks for hidden states."""
        return Headless(self)

    # The vision side: does not depend on the question.

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """Vision features of frames: [F, V, 3, H, W] to [F, V, patches, E], wider if the reducer reads more of it.

        Raises:
            ValueError: the number of views or their size is not the configuration's.
        """
        views = self.config.views_per_frame
        if pixel_values.dim() != 5 or pixel_values.shape[1] != views:
            raise ValueError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}, expected (frames, {views}, 3, height, width) "
                f"at resolution_ratio {self.config.resolution_ratio}. Use the model's own processor."
            )
        features = encode_views(self.vision_tower, pixel_values.flatten(0, 1), self.reducer.reads)
        return features.unflatten(0, pixel_values.shape[:2])

    def reduce_frames(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """Projected rows of frames.

        Args:
            features: [F, V, patches, E].

        Returns:
            Patches [F, P, D], None if nothing will read them, and reduced tokens [F, Q, D] (with
            ``identity`` the patches themselves; with a reducer that is late, what it will read).

        Raises:
            ValueError: the features lack what the reducer reads besides patches.
        """
        width = self.config.vision.hidden_size
        if self.reducer.reads and features.shape[-1] == width:
            raise ValueError(
                f"The reducer {self.config.reducer!r} reads more of the vision tower than the patches that these "
                "features hold. Give pixel_values instead."
            )
        features = features.to(next(self.projector.parameters()).dtype)
        grid, patches = join_crops(features, self.config.resolution_ratio)
        if self.reducer.is_late:
            return None, grid  # [F, N, what the reducer reads]
        if self.reducer.keeps_patches:
            projected = self.projector(patches)  # [F, P, D]
            return projected, projected
        if self.prefusion is None:
            return None, self._reduce(grid).tokens  # [F, Q, D]
        projected = self.projector(patches[..., :width])  # [F, P, D]
        if self.reducer.reads_projected:
            return projected, self.reducer(projected[:, : grid.shape[1]]).tokens  # the grid is the first of the patches
        return projected, self._reduce(grid).tokens

    def _reduce(self, grid: Tensor, *question: Question) -> Reduced:
        """Reduced tokens at language width of frames [F, N, what the reducer reads]."""
        if self.reducer.reads_projected:
            return self.reducer(self.projector(grid), *question)
        reduced = self.reducer(grid, *question)
        tokens = self.projector(reduced.tokens)
        if reduced.projected is not None:
            tokens = torch.cat([reduced.projected, tokens], dim=1)
        return replace(reduced, tokens=tokens, projected=None)

    def frame_tokens(self, vision: Tensor, text: splice.TextRows, prompt_of_frame: Tensor) -> Reduced:
        """What the language model reads of frames.

        Args:
            vision: [F, Q, D], or [F, N, what the reducer reads] if it is late: see ``SeenFrames.vision``.
            text: of the prompts.
            prompt_of_frame: [F] int64.
        """
        if self.config.vision_tokens_from == "nowhere":
            return Reduced(vision, valid=torch.zeros(vision.shape[:2], dtype=torch.bool, device=vision.device))
        if not self.reducer.is_late:
            return Reduced(vision)
        return self._reduce(vision, *([] if text.question is None else [text.question.take(prompt_of_frame)]))

    def read(self, patches: Tensor | None, reduced: Tensor, text: Tensor | None) -> Fused:
        """Pre-fusion of frames [F, P, D], [F, Q, D] and their text [F, T, D]; without it, nothing changes."""
        if self.prefusion is None:
            return Fused(reduced, text, ())
        fused = self.prefusion(self._vision_rows(patches, reduced), text, num_outputs=self._num_outputs(reduced))
        return Fused(fused.vision if self._num_outputs(reduced) else reduced, fused.text, fused.keys_values)

    def see(self, pixel_values: Tensor, text: Tensor) -> SeenFrames:
        """All that any question will need of some frames.

        Args:
            pixel_values: [F, V, 3, H, W].
            text: [N, D], the text before the first frame, from ``text_before_frames``.
        """
        return self.read_first(*self.reduce_frames(self.encode_frames(pixel_values)), text)

    def read_first(self, patches: Tensor | None, reduced: Tensor, text: Tensor) -> SeenFrames:
        """Pre-fusion of frames [F, P, D], [F, Q, D] and of the text [N, D] before the first of them."""
        text = text.expand(len(reduced), -1, -1)
        if self.prefusion is None:
            return SeenFrames(vision=reduced, text=text, keys_values=())
        rows = torch.cat([self._vision_rows(patches, reduced), text], dim=1)  # [F, P + Q + N, D]
        num_vision, num_text = self._num_outputs(reduced), text.shape[1]
        fused = self.prefusion(rows, num_outputs=num_vision + num_text)
        last = rows[:, :0] if fused.vision is None else fused.vision
        vision, text = last.split((num_vision, num_text), dim=1)
        return SeenFrames(vision=vision if num_vision else reduced, text=text, keys_values=fused.keys_values)

    def _vision_rows(self, patches: Tensor | None, reduced: Tensor) -> Tensor:
        """What pre-fusion reads of frames before any text."""
        assert patches is not None
        both = self._num_outputs(reduced) and not self.reducer.keeps_patches  # which are not read twice
        return torch.cat([patches, reduced], dim=1) if both else patches

    def _num_outputs(self, reduced: Tensor) -> int:
        """Vision rows that pass through pre-fusion for the language model."""
        return reduced.shape[1] if self.config.vision_tokens_from == "prefusion" else 0

    def read_again(self, keys_values: tuple[KeysValues, ...], text: Tensor, num_texts: int = 1) -> Tensor:
        """Pre-fusion of other text about frames that were read before: ``num_texts`` of equal length in [F, T, D]."""
        if self.prefusion is None or text.shape[1] == 0:
            return text
        fused = self.prefusion(keys_values, text, num_texts=num_texts).text
        assert fused is not None
        return fused

    def text_before_frames(self, inputs: ModelInputs) -> Tensor:
        """Embeddings [N, D] of the text before the first frame, as far as it is the same in all prompts."""
        is_image, visible = inputs.input_ids == self.config.image_token_id, self._fusible(inputs)
        before = visible & (is_image.cumsum(1) == 0) & is_image.any(1, keepdim=True)
        rows = [row[mask].tolist() for row, mask in zip(inputs.input_ids, before, strict=True)]
        same = [column[0] for column in itertools.takewhile(lambda ids: len({*ids}) == 1, zip(*rows, strict=False))]
        return self.get_input_embeddings()(torch.tensor(same, dtype=torch.long, device=inputs.input_ids.device))

    # The seam.

    def inside(self, fused: FusedPrompt) -> dict[str, insides.Inside]:
        """What the language model is given besides some prompts, as keywords: for most reducers nothing."""
        return insides.arguments(self.reducer, fused, self.config)

    def fuse(self, inputs: ModelInputs) -> FusedPrompt:
        """Turn ids and pixels into the embeddings that the language model reads.

        Frames pass through in groups of ``frames_per_pass``. Text is fused with each frame of its
        prompt and averaged over them in float32; prompts without frames stay as they are. Prompts about the same
        streamed frames share one pass over them.

        Raises:
            ValueError: frames and their places do not agree, there is no frame where one was promised, or frames come
                both as pixels and as features.
        """
        if inputs.features is not None and inputs.pixel_values is not None:
            raise ValueError("A batch holds pixel_values and features. Give one of them: features are made of pixels.")
        if inputs.pixel_values is not None and not isinstance(inputs.pixel_values, Tensor):
            fusion = StreamedFusion(self, inputs)
            for chunk in inputs.pixel_values:
                fusion.add(chunk)
            return fusion.prompt()
        text = self.text_rows(inputs)
        given = inputs.pixel_values if inputs.features is None else inputs.features
        num_frames = 0 if given is None else given.shape[0]
        frames = splice.frames_of_prompts(text.is_image, num_frames, self.config.tokens_per_frame)
        prompt_of_frame = torch.arange(len(text.ids), device=text.ids.device).repeat_interleave(frames)
        groups = self._groups(given, prompt_of_frame)
        tokens, total = self._pass_frames(groups, text, seen=inputs.features is not None)
        return splice.fused_prompt(text, text.with_fused(total, frames), tokens, frames)

    def text_rows(self, inputs: ModelInputs) -> splice.TextRows:
        """Embed the text of some prompts, and find what pre-fusion reads of it.

        Raises:
            ValueError: the ids are not a batch of prompts.
        """
        ids = inputs.input_ids
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(
                f"input_ids have the shape {tuple(ids.shape)}, expected (prompts, tokens) with at least one."
            )
        is_image = ids == self.config.image_token_id
        embeds, visible = self.get_input_embeddings()(ids.masked_fill(is_image, 0)), self._fusible(inputs)  # [B, T, D]
        return splice.TextRows(
            ids=ids,
            mask=inputs.attention_mask if inputs.attention_mask is not None else torch.ones_like(ids),
            labels=None if inputs.labels is None else inputs.labels.masked_fill(is_image, -100),
            is_image=is_image,
            visible=visible,
            embeds=embeds,
            packed=splice.pack(embeds, visible),
            question=self._question(embeds, visible, is_image) if self.reducer.reads_question else None,
        )

    def _question(self, embeds: Tensor, visible: Tensor, is_image: Tensor) -> Question:
        """What reducers read of the text of prompts: embeds [B, T, D], visible and is_image [B, T] bool."""
        asked = splice.pack(embeds, visible & (is_image.cumsum(1) > 0))
        if not self.reducer.reads_hidden:
            return Question(asked.embeds, asked.valid)
        mask = asked.valid.long()
        mask[:, 0] = 1  # where nothing is asked, so that no row looks at nothing
        with torch.no_grad():
            read = self.language_model.model(inputs_embeds=asked.embeds, attention_mask=mask, use_cache=False)
        return Question(read.last_hidden_state, asked.valid)

    def _fusible(self, inputs: ModelInputs) -> Tensor:
        """Which tokens pre-fusion reads: [B, T] bool."""
        return splice.fusible(
            inputs,
            image_token_id=cast(int, self.config.image_token_id),
            fuse_token_id_zero=self.config.fuse_token_id_zero,
            fuse_answers=self.config.fuse_answers,
        )

    def _groups(self, frames: Tensor | None, prompt_of_frame: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames, or their features, with the prompt of each, ``frames_per_pass`` at a time."""
        if frames is not None:
            yield from zip(frames.split(self.frames_per_pass), prompt_of_frame.split(self.frames_per_pass), strict=True)

    def _pass_frames(
        self, groups: Iterator[tuple[Tensor, Tensor]], text: splice.TextRows, *, seen: bool
    ) -> tuple[list[Reduced], Tensor]:
        """Vision tokens of each group, and fused text [B, N, D] summed over the frames of each prompt, float32.

        ``seen`` says that the groups hold features instead of pixels.
        """
        rows = text.packed.embeds
        tokens, total = [], torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for frames, prompt_of_frame in groups:
            patches, reduced = self.reduce_frames(frames if seen else self.encode_frames(frames))
            fused = self.read(patches, reduced, rows[prompt_of_frame])
            assert fused.vision is not None
            assert fused.text is not None
            tokens.append(self.frame_tokens(fused.vision, text, prompt_of_frame))  # [F, Q, D]
            total = total.index_add(0, prompt_of_frame, fused.text.float())  # [B, N, D]
        return tokens, total

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inside: insides.Inside | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch of prompts, and the loss when ``labels`` are given.

        Args:
            input_ids: [B, T], image tokens in the places of frames.
            pixel_values: [F, V, 3, H, W], all frames of the batch.
            attention_mask: [B, T], 0 at padding, on either side.
            answer_mask: [B, T], 1 at tokens that the assistant wrote.
            labels: [B, T], -100 where nothing is learned. Answers are then never fused.
            inputs_embeds: [B, S, D], in place of ``input_ids``: an already fused prompt.
            position_ids: [B, S]. None: counted over the attention mask.
            past_key_values: the language model's cache.
            inside: with ``inputs_embeds`` of a reducer that acts inside the language model, what ``inside`` returns.
            logits_to_keep: compute logits for so many last positions only; 0 is all.
            **kwargs: for the language model.

        Raises:
            ValueError: frames and places do not agree, or frames come on top of a filled cache.
        """
        read, labels = self.language_inputs(
            input_ids, pixel_values, attention_mask, answer_mask, labels, inputs_embeds, position_ids, past_key_values
        )
        kwargs |= {} if inside is None else {insides.KEYWORD: inside}
        return self.language_model(**read, labels=labels, logits_to_keep=logits_to_keep, **kwargs)

    def language_inputs(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        answer_mask: Tensor | None,
        labels: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """What the language model reads, and the labels of its rows; the arguments are those of ``forward``."""
        is_first = past_key_values is None or past_key_values.get_seq_length() == 0
        if not is_first and pixel_values is not None:
            raise ValueError(
                "pixel_values were given together with past_key_values that already hold a prompt. Frames change the "
                "fused text before them: pass the whole conversation without past_key_values."
            )
        inside: dict[str, insides.Inside] = {}
        if inputs_embeds is None and is_first:
            if input_ids is None:
                raise ValueError("Give input_ids, or inputs_embeds made by fuse().")
            fused = self.fuse(
                ModelInputs(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    answer_mask=answer_mask,
                    pixel_values=pixel_values,
                    labels=labels,
                )
            )
            input_ids, inputs_embeds, labels = None, fused.inputs_embeds, fused.labels
            padded = attention_mask is not None or not bool(fused.attention_mask.all())
            attention_mask = fused.attention_mask if padded else None
            inside = self.inside(fused)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            length = inputs_embeds.shape[1] if inputs_embeds is not None else cast(Tensor, input_ids).shape[1]
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        read = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **inside,
        }
        return read, labels

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Iterable[FrameChunk | SeenChunk] | None = None,
        attention_mask: Tensor | None = None,
        answer_mask: Tensor | None = None,
        fused: FusedPrompt | None = None,
        **kwargs: Any,
    ) -> Tensor | ModelOutput:
        """Continue prompts: ``fuse`` once, then transformers' ``generate`` with all its arguments.

        Args:
            input_ids: [B, T], as in ``forward``.
            pixel_values: as in ``ModelInputs``: a tensor, or chunks of frames.
            attention_mask: [B, T]; pad on the left to generate for a batch.
            answer_mask: [B, T].
            fused: a prompt made by ``fuse``, in place of all the others. With it, ``past_key_values`` may hold the
                keys and values of its first positions.
            **kwargs: as in transformers: ``max_new_tokens``, ``do_sample``, ``num_beams``, ``streamer``, ...

        Returns:
            Ids of prompt and answer, [B, S + new], or what ``return_dict_in_generate`` asks for.

        Raises:
            ValueError: neither or both of ``input_ids`` and ``fused``, a cache that holds an earlier turn, or a prompt
                longer than the model's context.
        """
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and fused is None:
            raise ValueError(
                f"generate() was given a cache of {cache.get_seq_length()} positions. Frames change all the text of a "
                "prompt, so a cache from an earlier turn does not fit: pass the whole conversation instead."
            )
        refuse_assistance(kwargs, self.generation_config)
        if (input_ids is None) == (fused is None):
            raise ValueError("generate() needs input_ids (from the processor) or fused (from fuse()), one of the two.")
        if fused is None:
            fused = self.fuse(
                ModelInputs(
                    input_ids=cast(Tensor, input_ids),
                    attention_mask=attention_mask,
                    answer_mask=answer_mask,
                    pixel_values=pixel_values,
                )
            )
        length, context = fused.inputs_embeds.shape[1], self.config.text.max_position_embeddings
        if length >= context:
            raise ValueError(
                f"The prompt has {length} tokens, but the model's context holds {context}, one of them for the answer. "
                "Give fewer frames or less text, or load the model with a larger text_config.max_position_embeddings."
            )
        is_image = fused.input_ids == self.config.image_token_id
        # Penalties look prompt ids up among the logits, where the image token has no place.
        stand_in = self.config.text.pad_token_id
        known_ids = fused.input_ids.masked_fill(is_image, stand_in if stand_in is not None else 0)
        output = cast(Any, super()).generate(
            known_ids,
            inputs_embeds=fused.inputs_embeds,
            attention_mask=fused.attention_mask,
            **self.inside(fused),
            **kwargs,
        )
        sequences = output if isinstance(output, Tensor) else cast(Any, output).sequences
        # Whoever gave ids finds them in front of the answer, those of tokens that frames do not have included.
        cut = input_ids is not None and input_ids.shape[1] > fused.input_ids.shape[1]
        ids = cast(Tensor, input_ids) if cut else fused.input_ids
        ids = ids.repeat_interleave(sequences.shape[0] // len(ids), dim=0)
        sequences = torch.cat([ids, sequences[:, known_ids.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        cast(Any, output).sequences = sequences
        return cast(ModelOutput, output)
