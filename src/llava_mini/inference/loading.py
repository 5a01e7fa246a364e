"""A model's name to a model and its processor on a device, if they fit there."""

from pathlib import Path

import torch

from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.tensors import read_json
from llava_mini.config import LlavaMiniConfig
from llava_mini.inference.devices import choose_device, choose_dtype
from llava_mini.inference.memory import available_memory, check_memory, fitting_frames, memory_need, meta_model
from llava_mini.inference.quantization import quantization_config
from llava_mini.model.cost import parameters
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor


def read_config(name: str) -> LlavaMiniConfig:
    """The configuration of a model, without its weights; from the hub only this file is fetched.

    Raises:
        ValueError: there is no such model, or its folder holds no configuration.
    """
    on_hub = name.count("/") == 1 and not Path(name).expanduser().exists()
    if not on_hub:
        path = locate(name) / "config.json"
        if not path.exists():
            raise ValueError(f"{name!r} holds no config.json. Is it the folder of a model?")
        read_json(path)  # says what is wrong with a file that is damaged
    try:
        fields, _ = LlavaMiniConfig.get_config_dict(name if on_hub else locate(name))
    except OSError as error:
        raise ValueError(
            f"{name!r} is not a folder here, and its config.json cannot be fetched from the hub. Check the name and "
            "the network, or download the model elsewhere and give its folder."
        ) from error
    if fields.get("model_type") != LlavaMiniConfig.model_type:
        raise ValueError(
            f"The model {name!r} is of type {fields.get('model_type')!r}, not a LLaVA-Mini. LLaVA-1.5 and adapters are "
            "turned into one by llava-mini convert."
        )
    return LlavaMiniConfig.from_dict(fields)


def load(
    name: str, device: str | None, dtype: str | None, quantization: str | None
) -> tuple[LlavaMiniForConditionalGeneration, LlavaMiniProcessor]:
    """Load a model and its processor; the arguments are those of ``Engine.load``.

    Raises:
        ValueError: no such model, device or number format; weights that do not fit the configuration; or not enough
            memory.
    """
    place = choose_device(device)
    quantized = None if quantization is None else quantization_config(quantization, place)
    config = read_config(name)
    number_format = choose_dtype(dtype, place, parameters(config).total)

    empty, available = meta_model(config), available_memory(place)
    choice = f"{place} in {str(number_format).removeprefix('torch.')}{f', {quantization}' if quantization else ''}"
    others = {
        "dtype bfloat16": memory_need(empty, torch.bfloat16),
        "quantization int8": memory_need(empty, torch.bfloat16, "int8"),
    }
    check_memory(name, memory_need(empty, number_format, quantization), available, choice, others)

    folder = locate(name)
    processor = LlavaMiniProcessor.from_pretrained(folder)
    if quantized is not None and place.type == "cuda":  # bitsandbytes packs the weights on the card; needs accelerate
        model = LlavaMiniForConditionalGeneration.from_pretrained(
            folder, dtype=number_format, quantization_config=quantized, device_map={"": place}
        )
    else:
        model = LlavaMiniForConditionalGeneration.from_pretrained(
            folder, dtype=number_format, quantization_config=quantized
        )
        model.to(place)  # pyright: ignore[reportArgumentType]
    model.frames_per_pass = fitting_frames(empty, number_format, quantization, available)
    return model, processor
