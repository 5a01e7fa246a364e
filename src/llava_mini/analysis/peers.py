"""LLaVA-1.5 and LLaVA-NeXT of transformers to be analysed."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from llava_mini.analysis.canvas import Canvas, grid_paint, picture_of
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.subject import Prompted, Subject
from llava_mini.analysis.words import words_of
from llava_mini.processor.image import to_rgb

FAMILIES: dict[str, tuple[str, type[Any]]] = {
    "LlavaForConditionalGeneration": ("LLaVA-1.5", LlavaForConditionalGeneration),
    "LlavaNextForConditionalGeneration": ("LLaVA-NeXT", LlavaNextForConditionalGeneration),
}
"""Architectures of transformers, with what people call them."""


def load_peer(folder: Path, architecture: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a model of ``FAMILIES`` and its processor.

    Raises:
        ValueError: The folder holds no processor that can be read.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} holds a model of transformers, but its processor cannot be read ({error}). Take a folder "
            "that transformers wrote, such as those of llava-hf on the hub."
        ) from error
    _, build = FAMILIES[architecture]
    return build.from_pretrained(folder, dtype=dtype).to(device), processor


def peer_subject(name: str, model: Any, processor: Any, *, num_shown: int) -> Subject:
    """Make a LLaVA of transformers ready to be analysed.

    Args:
        name: What it is called.
        model: Of a class in ``FAMILIES``, on its device.
        processor: The model's.
        num_shown: Images of a prompt of which pictures and maps are kept.

    Raises:
        ValueError: The processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"The processor of {name!r} has no chat template, so there is no telling how a question is put. Give it "
            "one: processor.chat_template."
        )
    family, _ = FAMILIES[type(model).__name__]
    generation = model.generation_config.eos_token_id
    ends = processor.tokenizer.eos_token_id if generation is None else generation
    front = _FrontEnd(model.eval(), processor, num_shown)
    config = model.config.text_config
    return Subject(
        name=name,
        family=family,
        decoder=model.model.language_model,
        stop_ids=() if ends is None else (ends,) if isinstance(ends, int) else tuple(ends),
        tokenizer=processor.tokenizer,
        prompt=front.prompt,
        reads_videos=False,
        context=config.max_position_embeddings,
    )


class _FrontEnd:
    """From a question to what the language model reads."""

    def __init__(self, model: Any, processor: Any, num_shown: int) -> None:
        self.model, self.processor, self.num_shown = model, processor, num_shown

    @torch.inference_mode()
    def prompt(self, asked: Asked) -> Prompted:
        """Put image tokens into the embeddings of a question, as the model's own ``forward`` does.

        Raises:
            ValueError: The prompt is longer than the model's context.
        """
        messages = _opened(asked.messages)
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        ids = inputs["input_ids"][0]
        context = self.model.config.text_config.max_position_embeddings
        if len(ids) >= context:
            raise ValueError(
                f"The prompt of {asked.name!r} has {len(ids)} tokens, but the model's context holds {context}. Give "
                "records with fewer images."
            )
        sizes = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        pixels = inputs["pixel_values"].to(self.model.dtype)
        features: list[Tensor] = self.model.get_image_features(pixel_values=pixels, **sizes).pooler_output
        is_vision = ids == self.model.config.image_token_id
        after = ~is_vision & (is_vision.cumsum(0) > 0)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(is_vision[:, None], torch.cat(list(features)).to(embeds))
        return Prompted(
            embeds=embeds,
            is_vision=is_vision,
            words=tuple(words_of(ids, after, self.processor.tokenizer)),
            tokens_of_frames=[len(tokens) for tokens in features],
            write=partial(self._write, embeds[None]),
            canvases=self._canvases(messages, inputs, features),
        )

    def _write(self, embeds: Tensor, max_tokens: int) -> list[int]:
        """Continue embeddings [1, S, D], greedily."""
        pad = self.processor.tokenizer.pad_token_id
        ids = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0 if pad is None else pad,
        )
        return ids[0].tolist()

    def _canvases(
        self, messages: list[dict[str, Any]], inputs: Mapping[str, Tensor], features: list[Tensor]
    ) -> tuple[Canvas, ...]:
        """The pictures of a prompt, with the places of their tokens."""
        vision, reader = self.model.config.vision_config, self.processor.image_processor
        side = vision.image_size // vision.patch_size
        originals = [part["image"] for message in messages for part in message["content"] if "image" in part]
        canvases, first = list[Canvas](), 0
        for number, tokens in enumerate(features[: self.num_shown]):
            views = inputs["pixel_values"][number]
            views = views if views.dim() == 4 else views[None]  # [tiles, 3, H, W]; the whole image first
            class_tokens = int(self.model.config.vision_feature_select_strategy == "full")
            start = first + class_tokens
            picture = picture_of(views[0], reader.image_mean, reader.image_std)
            title = f"image {number + 1}"
            if len(tokens) >= class_tokens + side * side:
                canvases.append(Canvas(title=title, picture=picture, paint=grid_paint(start, side, side)))
            if "image_sizes" in inputs and not class_tokens and len(tokens) > side * side + 1:
                rows, columns = self._tiles(inputs["image_sizes"][number], side)
                paint = grid_paint(start + side * side, rows, columns, skipped=1)  # a row ends with a new line
                picture = np.asarray(originals[number].resize((columns * vision.patch_size, rows * vision.patch_size)))
                canvases.append(Canvas(title=f"{title}, in tiles", picture=picture, paint=paint))
            first += len(tokens)
        return tuple(canvases)

    def _tiles(self, size: Tensor, side: int) -> tuple[int, int]:
        """Rows and columns of patches of an image in tiles, its padding cut off."""
        config = self.model.config
        high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        rows, columns = unpad_image(torch.empty(1, high * side, wide * side), size).shape[1:]
        return rows, columns


def _opened(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with pictures in place of paths."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": to_rgb(part["image"])} if "image" in part else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
