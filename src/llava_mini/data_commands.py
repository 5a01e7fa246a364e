"""What each command of ``llava-mini data`` runs. As in ``commands``, tables go to stdout and progress to stderr."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from llava_mini.checkpoint.assemble import refit
from llava_mini.checkpoint.locate import locate
from llava_mini.commands import check_writable, checked
from llava_mini.data.check import CheckSettings
from llava_mini.data.features import FeatureKind, images_in, plan_features, write_features
from llava_mini.data.mixture import Mixture
from llava_mini.data.quarantine import write_quarantine
from llava_mini.data.synthetic import export
from llava_mini.data.synthetic.splits import Split
from llava_mini.inference.loading import load, read_config
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.prompt import load_template
from llava_mini.recipes.tuning_data import find_data


def synth(
    folder: Path, *, split: Split, images: int, clips: int, first: int, questions: int, processes: int | None
) -> None:
    """Write records of the drawn world in the format of LLaVA; as in ``data.synthetic.export``."""
    settings = export.ExportSettings(split=split, images=images, clips=clips, first=first, questions=questions)
    made = export.export_world(folder, settings, processes=processes)
    drawn = sum(made.drawn.values())
    print(f"{made.folder}: {images} images, {clips} clips, {made.num_questions} questions")
    if not drawn:
        print("All files were there.")
        return
    work = "1 process" if made.processes == 1 else f"{made.processes} processes"
    print(f"{drawn} files drawn and written in {made.seconds:.1f} s by {work}: {drawn / made.seconds:.0f} per second.")
    if made.draw_milliseconds:  # 0 without images, and by a clock too coarse for the few there are
        print(f"One core makes {1000 / made.draw_milliseconds:.0f} images with questions per second, files aside.")


def check(
    files: Sequence[str], media: Sequence[Path], model: str, settings: CheckSettings, *, quarantine: Path | None
) -> bool:
    """Read records and their media once and print what they are; as in ``data.check``.

    Args:
        files: Lists of records, or shards.
        media: Where paths in the records start, as in ``recipes.tuning_data.find_data``.
        model: Whose tokens and pictures.
        settings: What is asked for.
        quarantine: Where what is damaged is listed.

    Returns:
        Whether nothing is damaged, and all is as it was published.

    Raises:
        ValueError: A file is missing or no list of records, or the quarantine cannot be written.
    """
    if quarantine is not None:
        check_writable(quarantine)
    lists, stream = find_data(files, media)
    config = read_config(model)
    on_hub = model.count("/") == 1 and not Path(model).expanduser().exists()
    kept = LlavaMiniProcessor.from_pretrained(model if on_hub else locate(model))
    processor = refit(kept, config, load_template("plain") if settings.captions else None)
    report = checked(lists, stream, processor, config, settings)
    if quarantine is not None:
        write_quarantine(quarantine, report.damaged)
    return report.is_clean


def features(
    files: Sequence[Path],
    media: Sequence[Path],
    output: Path,
    model: str,
    *,
    device: str | None,
    dtype: str | None,
) -> bool:
    """Compute what a model's vision tower says of all images in some records; as in ``data.features``.

    Returns:
        Whether every image could be read.

    Raises:
        ValueError: A file is missing or no list of records, no such model, or the features do not fit on the disk.
    """
    lists, stream = find_data(list(map(str, files)), media)
    if stream is not None:
        raise ValueError(f"{stream.shards[0]!r} is a shard. Features are kept of images in lists of records only.")
    mixture = Mixture(lists)
    whole, processor = load(model, device, dtype, None)
    plan = plan_features(images_in(mixture), output, FeatureKind.of(whole.vision_tower, processor))
    print(plan, flush=True)
    total = len(plan.missing)
    with tqdm(total=total, desc="computing", unit=" images", leave=False, disable=None, file=sys.stderr) as bar:
        damaged = write_features(whole.vision_tower, plan, progress=bar.update)
    for one in damaged:
        print(f"not written: {one.reason}")
    print(f"{len(plan.missing) + plan.num_present + len(plan.damaged) - len(damaged)} images are in {output}")
    return not damaged
