"""What each command of ``llava-mini data`` runs. As in ``commands``, tables go to stdout and progress to stderr."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from llava_mini.checkpoint.locate import locate
from llava_mini.commands import check_writable
from llava_mini.data.check import CheckSettings, DataCheck, write_quarantine
from llava_mini.data.features import FeatureKind, images_in, plan_features, write_features
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.synthetic import export
from llava_mini.data.synthetic.splits import Split
from llava_mini.inference.loading import load, read_config
from llava_mini.processor.processor import LlavaMiniProcessor


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
    files: Sequence[Path], media: Path | None, model: str, settings: CheckSettings, *, quarantine: Path | None
) -> bool:
    """Read records and their media once and print what they are; as in ``data.check``.

    Returns:
        Whether nothing is damaged, and all is as it was published.

    Raises:
        ValueError: A file is missing or no list of records, or the quarantine cannot be written.
    """
    if quarantine is not None:
        check_writable(quarantine)
    mixture, config = _mixture(files, media), read_config(model)
    processor = LlavaMiniProcessor.from_pretrained(model if model.count("/") == 1 else locate(model))
    start, work = time.perf_counter(), DataCheck(mixture, processor, config, settings)
    with _bar(len(mixture), "reading", " records") as bar:
        report = work.run(bar.update)
    print(report.text(), *work.examples(report), sep="\n\n")
    print(f"\n{len(mixture)} records read in {time.perf_counter() - start:.1f} s")
    if quarantine is not None:
        write_quarantine(quarantine, report.damaged)
    return report.is_clean


def features(
    files: Sequence[Path], media: Path | None, output: Path, model: str, *, device: str | None, dtype: str | None
) -> bool:
    """Compute what a model's vision tower says of all images in some records; as in ``data.features``.

    Returns:
        Whether every image could be read.

    Raises:
        ValueError: A file is missing or no list of records, no such model, or the features do not fit on the disk.
    """
    mixture = _mixture(files, media)
    whole, processor = load(model, device, dtype, None)
    plan = plan_features(images_in(mixture), output, FeatureKind.of(whole.vision_tower, processor))
    print(plan, flush=True)
    with _bar(len(plan.missing), "computing", " images") as bar:
        damaged = write_features(whole.vision_tower, plan, progress=bar.update)
    for one in damaged:
        print(f"not written: {one.reason}")
    print(f"{len(plan.missing) + plan.num_present + len(plan.damaged) - len(damaged)} images are in {output}")
    return not damaged


def _mixture(files: Sequence[Path], media: Path | None) -> Mixture:
    if media is not None and not media.is_dir():
        raise ValueError(f"There is no folder {str(media)!r}. Give the folder where the paths in the records start.")
    return Mixture([DataFile(path=path, media_folder=media) for path in files])


def _bar(total: int, what: str, unit: str) -> "tqdm[NoReturn]":
    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=None, file=sys.stderr)
