"""Small parts and data for the two stages: a language model and a tower as folders, and drawn records."""

from pathlib import Path
from typing import Any

from llava_mini.data.mixture import DataFile
from llava_mini.data.synthetic.export import ExportSettings, export_world
from llava_mini.processor.prompt import load_template
from tests.tiny_engine import tiny_parts


def save_parts(folder: Path, *, template: str | None = "tiny", **text: Any) -> tuple[Path, Path]:
    """Folders of a random language model, which talks in bytes, and of a random tower."""
    model, processor = tiny_parts(**{"max_position_embeddings": 1024, **text})
    language, tower = folder / "language", folder / "tower"
    model.language_model.save_pretrained(language)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = load_template(template) if template else None
    tokenizer.save_pretrained(language)
    model.vision_tower.save_pretrained(tower)
    return language, tower


def drawn_data(folder: Path, *, images: int = 6, clips: int = 2) -> tuple[DataFile, ...]:
    """Records of the drawn world in the format of LLaVA."""
    export_world(folder, ExportSettings(images=images, clips=clips, questions=1), processes=1)
    return (DataFile(path=folder / "train.json", media_folder=folder),)
