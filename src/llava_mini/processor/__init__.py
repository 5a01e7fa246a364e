"""Pixels and words become tensors. No weights here."""

from llava_mini.processor.image import MAX_PIXELS, ImageMode, ImageSource, ViewSettings, make_views, to_rgb
from llava_mini.processor.media_stream import FrameResize
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.prompt import TEMPLATES, load_template
from llava_mini.processor.video import (
    Frame,
    FrameSampling,
    VideoSource,
    choose_frames,
    frames_of,
    kind_of_file,
    nearest_square,
    spread,
)

__all__ = [
    "MAX_PIXELS",
    "TEMPLATES",
    "Frame",
    "FrameResize",
    "FrameSampling",
    "ImageMode",
    "ImageSource",
    "LlavaMiniProcessor",
    "VideoSource",
    "ViewSettings",
    "choose_frames",
    "frames_of",
    "kind_of_file",
    "load_template",
    "make_views",
    "nearest_square",
    "spread",
    "to_rgb",
]
