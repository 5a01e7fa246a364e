"""LLaVA-Mini: images and video through one vision token per frame (arXiv 2501.03895).

Importing this package registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from llava_mini.checkpoint.from_original import conversion_mapping
from llava_mini.config import RELEASED_MODEL_TYPE, LlavaMiniConfig, ReleasedConfig, preset
from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs
from llava_mini.inference.engine import Engine
from llava_mini.inference.settings import Caching, Request
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor

__version__ = "0.1.0"
__all__ = [
    "Caching",
    "Engine",
    "FrameChunk",
    "FusedPrompt",
    "LlavaMiniConfig",
    "LlavaMiniForConditionalGeneration",
    "LlavaMiniProcessor",
    "ModelInputs",
    "Request",
    "preset",
]

AutoConfig.register(LlavaMiniConfig.model_type, LlavaMiniConfig)
AutoConfig.register(RELEASED_MODEL_TYPE, ReleasedConfig)
AutoModelForImageTextToText.register(LlavaMiniConfig, LlavaMiniForConditionalGeneration)
AutoProcessor.register(LlavaMiniConfig, LlavaMiniProcessor)
register_checkpoint_conversion_mapping(LlavaMiniConfig.model_type, conversion_mapping(), overwrite=True)
