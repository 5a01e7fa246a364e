"""What stands beside the weights: generation settings, tokenizer and processor."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llava_mini.checkpoint.source import Source
from llava_mini.checkpoint.tensors import read_json
from llava_mini.config import LlavaMiniConfig
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.published import TOKENIZER_FILES, published_settings

GENERATION_CONFIG = "generation_config.json"
PROCESSOR_CONFIG = "processor_config.json"

TOKENIZER_COMPANIONS = (
    GENERATION_CONFIG,
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that a plain language model shares with ours."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json")


def write_companions(source: Source, folder: Path) -> None:
    """Write everything but weights and config.json.

    A folder of ours is copied; for another, the generation settings are copied or made from the stop ids, and the
    processor is made from the configuration if there is a tokenizer.
    """
    if source.generation is not None:
        source.generation.save_pretrained(folder)
    if source.folder is None:
        return
    if source.layout == "ours":
        for path in sorted(source.folder.iterdir()):
            if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        if (folder / PROCESSOR_CONFIG).exists():
            _adjust_processor(folder / PROCESSOR_CONFIG, source.config)
        return
    tokenizer = None
    if any((source.folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        settings = published_settings(source.published, tokenizer.eos_token)
        LlavaMiniProcessor.from_config(source.config, tokenizer, **settings).save_pretrained(folder)
    if (source.folder / GENERATION_CONFIG).exists():
        shutil.copyfile(source.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    else:
        generation_config(source, tokenizer).save_pretrained(folder)


def _adjust_processor(path: Path, config: LlavaMiniConfig) -> None:
    """Tell a processor how many tokens a frame takes, which a new reducer changes."""
    settings = read_json(path)
    if settings.get("tokens_per_frame") != config.tokens_per_frame:
        path.write_text(json.dumps({**settings, "tokens_per_frame": config.tokens_per_frame}, indent=2) + "\n", "utf-8")


def generation_config(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """Greedy settings that stop where the language model or the tokenizer ends an answer."""
    text = source.config.text
    stop = {*_ids(text.eos_token_id), *_ids(tokenizer.eos_token_id if tokenizer is not None else None)}
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=sorted(stop) or None,
        pad_token_id=text.pad_token_id,
    )


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
