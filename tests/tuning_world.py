"""Small parts and data for the two stages: a language model and a tower as folders, and drawn records."""

import json
from pathlib import Path
from typing import Any

from llava_mini.data.mixture import DataFile
from llava_mini.data.streaming import StreamSettings
from llava_mini.data.synthetic.export import ExportSettings, export_world
from llava_mini.processor.prompt import load_template
from tests.data.shards import write_parquet
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


def drawn_shards(folder: Path, files: tuple[DataFile, ...]) -> StreamSettings:
    """The same records with their media in them, in two shards."""
    (file,) = files
    rows = []
    for record in json.loads(file.path.read_text()):
        media = {key: (file.folder / record[key]).read_bytes() for key in ("image", "video") if key in record}
        rows.append({"image": None, "video": None, **record, **media})
    shards = [write_parquet(folder / f"part-{shard}.parquet", rows[shard::2]) for shard in range(2)]
    return StreamSettings(shards=tuple(shards), name="stream")
