"""Small random models to be analysed: ours, and a LLaVA-1.5 and a LLaVA-NeXT of transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from llava_mini.analysis.ours import our_subject
from llava_mini.analysis.peers import peer_subject
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.subject import Subject
from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.processor.processor import LlavaMiniProcessor
from tests.tiny_engine import BYTES, picture
from tests.tiny_models import tiny_model

SIDE, PATCH = 8, 2
"""Pixels of a picture and of a patch: 16 patches."""

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{{ '<image>\n' if p['type'] == 'image' else p['text'] }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def our_parts(text: dict[str, Any] | None = None, **fields: Any) -> tuple[Any, LlavaMiniProcessor]:
    """A LLaVA-Mini that talks in random bytes, and its processor."""
    sizes = {"vocab_size": BYTES, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **(text or {})}
    model = tiny_model(text=sizes, **fields)
    return model, LlavaMiniProcessor.from_config(model.config, build_tokenizer([], vocab_size=BYTES), "tiny")


def ours(num_shown: int = 2, **fields: Any) -> Subject:
    """Such a model, ready to be analysed."""
    return our_subject("ours", *our_parts(**fields), num_frames=None, num_shown=num_shown)


def peer_parts(kind: str) -> tuple[Any, Any]:
    """A model of transformers and its processor. kind: ``llava`` or ``llava_next``."""
    tokenizer = build_tokenizer([], vocab_size=BYTES)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    reading = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "chat_template": TEMPLATE,
        "num_additional_image_tokens": 1,
    }
    shared = {"vision_config": vision, "text_config": text, "image_token_id": image_token}
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
        return _loud(model), LlavaProcessor(image_processor=CLIPImageProcessor(**size), **reading)
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared, image_grid_pinpoints=grids))
    images = LlavaNextImageProcessor(**size, image_grid_pinpoints=grids)
    return _loud(model), LlavaNextProcessor(image_processor=images, **reading)


def _loud(model: Any) -> Any:
    """Weights large enough that every mistake shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def peer(kind: str) -> Subject:
    """Such a model, ready to be analysed."""
    return peer_subject(kind, *peer_parts(kind), num_shown=2)


def save_peer(kind: str, folder: Path) -> Path:
    """The folder of such a model."""
    for part in peer_parts(kind):
        part.save_pretrained(folder)
    return folder


def asked(*, frames: int = 0, size: tuple[int, int] = (12, 10), question: str = "What is it?") -> Asked:
    """A question about a picture, or about a video of so many frames."""
    medium = (
        {"type": "video", "video": [picture(index, size) for index in range(frames)]}
        if frames
        else {"type": "image", "image": picture(0, size)}
    )
    message = {"role": "user", "content": [medium, {"type": "text", "text": question}]}
    return Asked(name="one", messages=[message], answer="red", right=lambda given: float(given == "red"))
