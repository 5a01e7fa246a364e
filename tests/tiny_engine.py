"""A small random model with a processor, as an engine or as a folder, and files to ask it about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.inference.engine import Engine
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from tests.tiny_models import tiny_model

BYTES = 261
"""Vocabulary of a tokenizer that knows bytes and five control tokens."""


def tiny_parts(
    seed: int = 0, fields: Mapping[str, Any] | None = None, **text: Any
) -> tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]:
    """A model that talks in random bytes and never ends by itself, and its processor."""
    sizes = {"vocab_size": BYTES, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 2, **text}
    model = tiny_model(seed=seed, text=sizes, **(fields or {}))
    return model, LlavaMiniProcessor.from_config(model.config, build_tokenizer([], vocab_size=BYTES), "tiny")


def tiny_engine(seed: int = 0, **text: Any) -> Engine:
    """An engine around ``tiny_parts``."""
    return Engine(*tiny_parts(seed, **text))


def save_tiny(folder: Path, seed: int = 0, **text: Any) -> Path:
    """The folder of such a model."""
    for part in tiny_parts(seed, **text):
        part.save_pretrained(folder)
    return folder


def picture(value: int = 0, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture that differs with ``value``."""
    random = np.random.default_rng(value)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_film(path: Path, *, seconds: int = 3, rate: int = 4) -> Path:
    """A film whose frames differ."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = 32
        for index in range(seconds * rate):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(index, (32, 32)))))
        container.mux(stream.encode())
    return path
