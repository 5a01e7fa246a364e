"""From the names of a model and of data to the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_mini.analysis.findings import AnalysisSettings, analyse
from llava_mini.analysis.ours import our_subject
from llava_mini.analysis.peers import FAMILIES, load_peer, peer_subject
from llava_mini.analysis.report import check_output, write_report
from llava_mini.analysis.samples import record_samples, world_samples
from llava_mini.analysis.subject import Subject
from llava_mini.checkpoint.locate import locate
from llava_mini.checkpoint.tensors import read_json
from llava_mini.config import RELEASED_MODEL_TYPE, LlavaMiniConfig
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.environment import environment
from llava_mini.inference.devices import choose_device, choose_dtype
from llava_mini.inference.loading import load

WORLD = "world"
"""The name of the drawn world among data."""

Progress = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Which model, and where it runs."""

    model: str
    device: str | None = None
    dtype: str | None = None
    num_frames: int | None = None
    """Frames of each video. None: one per second of a file, all of a clip of the world."""
    num_shown: int = 2
    """Frames or images of a question of which pictures are kept."""


def load_subject(loading: Loading) -> Subject:
    """Load a model to be analysed.

    Raises:
        ValueError: There is no such model, it is of another type, or it cannot be loaded.
    """
    folder = locate(loading.model)
    fields = read_json(folder / "config.json")
    architecture = next(iter(fields.get("architectures") or []), None)
    if fields.get("model_type") in (LlavaMiniConfig.model_type, RELEASED_MODEL_TYPE):
        model, processor = load(loading.model, loading.device, loading.dtype, None)
        return our_subject(loading.model, model, processor, num_frames=loading.num_frames, num_shown=loading.num_shown)
    if architecture not in FAMILIES:
        raise ValueError(
            f"The model {loading.model!r} is a {architecture or fields.get('model_type')}. An analysis reads a "
            f"LLaVA-Mini, or of transformers' own classes {' and '.join(FAMILIES)}."
        )
    device = choose_device(loading.device)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # 2 bytes a parameter, most often
    dtype = choose_dtype(loading.dtype, device, size // 2)
    return peer_subject(loading.model, *load_peer(folder, architecture, device, dtype), num_shown=loading.num_shown)


def analyse_model(
    loading: Loading,
    data: Sequence[str],
    output: Path,
    settings: AnalysisSettings,
    *,
    bench: Bench,
    media: Path | None = None,
    samples: int = 100,
    progress: Progress = lambda done: None,
) -> Path:
    """Analyse a model and return the path of the page.

    Args:
        loading: Which model.
        data: JSON and JSONL files in the format of LLaVA, or ``WORLD`` alone.
        output: The folder of the page.
        settings: What is done with each question.
        bench: The drawn world.
        media: Where the paths in records start. None: the folder of each file.
        samples: Most questions.
        progress: Called with the number of questions done since the last call.

    Raises:
        ValueError: Something that was asked for cannot be.
    """
    if samples < 1:
        raise ValueError(f"An analysis needs at least one question, got --samples {samples}.")
    check_output(output)
    if WORLD in data and len(data) > 1:
        raise ValueError(f"{WORLD!r} is the drawn world, which cannot be mixed with files. Give one or the others.")
    mixture = None if WORLD in data else Mixture([DataFile(path=Path(name), media_folder=media) for name in data])
    subject = load_subject(loading)
    asked = (
        world_samples(bench, samples, videos=subject.reads_videos)
        if mixture is None
        else record_samples(mixture, samples, videos=subject.reads_videos)
    )
    found = analyse(subject, asked, settings, progress)
    parameter = next(subject.decoder.parameters())
    facts = {"data": ", ".join(data), **environment(parameter.device, parameter.dtype)}
    return write_report(output, subject, found, settings, facts)
