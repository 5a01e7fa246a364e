"""Split a model into a plain causal language model and the front end that writes its prompts.

``language_model`` is an ordinary transformers folder: ``AutoModelForCausalLM`` and vLLM load it and
continue prompts that are given as embeddings (paper, appendix E.3). ``front_end`` holds the rest and
a copy of the embedding table, which the text of a prompt needs. ``convert`` joins the two again.
"""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from llava_mini.checkpoint.companions import TOKENIZER_COMPANIONS, write_companions
from llava_mini.checkpoint.convert import (
    MAX_SHARD_SIZE,
    check_destination,
    complete_or_nothing,
    dtype_name,
    write_config,
)
from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.source import EXPORTED_PARTS, Source, read_source
from llava_mini.checkpoint.tensors import size_in_bytes, write_shards
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import REDUCERS

EMBEDDINGS = "language_model.model.embed_tokens.weight"


def export(
    model: str | Path | LlavaMiniForConditionalGeneration,
    destination: str | Path,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write ``destination/language_model`` and ``destination/front_end``.

    Args:
        model: a loaded model, or anything that ``convert`` reads; a folder also brings its tokenizer and processor.
        destination: a folder that does not exist yet.
        max_shard_size: bytes, or as in "5GB".

    Returns:
        The destination.

    Raises:
        ValueError: as ``convert``, or the reducer acts inside the language model.
    """
    destination = Path(destination).expanduser()
    check_destination(destination)
    source = _in_memory(model) if isinstance(model, LlavaMiniForConditionalGeneration) else read_source(locate(model))
    if REDUCERS[source.config.reducer].acts_inside:
        raise ValueError(
            f"The reducer {source.config.reducer!r} acts inside the language model, and a plain language model would "
            "answer without it. Export a model with another reducer."
        )
    embeddings = source.tensors[EMBEDDINGS]
    num_bytes = size_in_bytes(source.tensors) + size_in_bytes({EMBEDDINGS: embeddings})
    with complete_or_nothing(destination, num_bytes) as folder:
        language_folder, front_folder = (folder / part for part in EXPORTED_PARTS)
        for part in (language_folder, front_folder):
            part.mkdir()
        write_config(source, front_folder)
        write_companions(source, front_folder)
        _write_language_companions(source, front_folder, language_folder)

        language = {name: value for name, value in source.tensors.items() if name.startswith("language_model.")}
        front = {name: value for name, value in source.tensors.items() if name not in language}
        front[EMBEDDINGS] = embeddings
        source.tensors.clear()
        write_shards(front, front_folder, source.finish, max_shard_size)
        plain = {name.removeprefix("language_model."): value for name, value in language.items()}
        language.clear()
        write_shards(
            plain, language_folder, lambda name, value: source.finish(f"language_model.{name}", value), max_shard_size
        )
    return destination


def _in_memory(model: LlavaMiniForConditionalGeneration) -> Source:
    """A loaded model, in the form of one on disk."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized, and export writes plain weights. Load it without quantization.")
    tied = model.all_tied_weights_keys
    tensors = {name: value for name, value in model.state_dict().items() if name not in tied}
    return Source(None, "ours", {}, deepcopy(model.config), tensors, generation=model.generation_config)


def _write_language_companions(source: Source, front_folder: Path, language_folder: Path) -> None:
    """Configuration, generation settings and tokenizer of the language model."""
    config = deepcopy(source.config.text)
    config.architectures = [cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)].__name__]
    config.dtype = dtype_name(source)
    config.save_pretrained(language_folder)
    for name in TOKENIZER_COMPANIONS:
        if (front_folder / name).exists():
            shutil.copyfile(front_folder / name, language_folder / name)
