"""The four sets that LLaVA-Mini was trained on (section 5.1 of the paper): their files, and what must be in them.

None can be downloaded by this project's tests; what each number rests on is said beside it, and in docs/data.md. A
number that could not be verified is not here: then only the size that papers and cards name is compared.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_mini.data.samples import KINDS, Kind


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """One set of records."""

    files: tuple[str, ...]
    """What its page offers."""
    pages: tuple[str, ...]
    """Where it is."""
    about: int
    """How many records papers name, rounded to ``rounded``."""
    rounded: int
    kinds: tuple[Kind, ...]
    """The kinds of samples in it."""
    exact: Mapping[Kind, int] = field(default_factory=dict)
    """How many there are of each kind. Empty: not known."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """How many records have their image below which folder. Empty: not known."""
    evidence: str
    """What the numbers rest on."""

    def __str__(self) -> str:
        """Where it is, and what its numbers rest on."""
        return f"{', '.join(self.files)} at {', '.join(self.pages)}; the numbers rest on {self.evidence}"

    def differences(self, kinds: Mapping[Kind, int], folders: Mapping[str, int]) -> list[str]:
        """Say how what was found differs from what was published; nothing if it does not.

        Args:
            kinds: How many records of each kind there are, damaged ones included.
            folders: How many records have their media below which first folder.
        """
        total = sum(kinds.values())
        found = []
        if self.exact:
            found += [
                f"{kinds.get(kind, 0)} records of kind {kind}, expected {self.exact.get(kind, 0)}"
                for kind in KINDS
                if kinds.get(kind, 0) != self.exact.get(kind, 0)
            ]
        else:
            if abs(total - self.about) > self.rounded / 2:
                found.append(f"{total} records, expected {self.about} to the nearest {self.rounded}")
            found += [
                f"{number} records of kind {kind}, expected none"
                for kind, number in sorted(kinds.items())
                if number and kind not in self.kinds
            ]
        return found + [
            f"{folders.get(name, 0)} records with media in {name}/, expected {self.folders.get(name, 0)}"
            for name in sorted({*folders, *self.folders})
            if self.folders and folders.get(name, 0) != self.folders.get(name, 0)
        ]


PUBLISHED_SETS: dict[str, PublishedSet] = {
    "llava-pretrain": PublishedSet(
        files=("blip_laion_cc_sbu_558k.json", "images.zip"),
        pages=("https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",),
        about=558_000,
        rounded=1000,
        kinds=("image",),
        evidence="the name of the file, and LLaVA's docs/Data.md",
    ),
    "llava-v1.5-mix665k": PublishedSet(
        files=("llava_v1_5_mix665k.json",),
        pages=(
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
            "https://github.com/haotian-liu/LLaVA#visual-instruction-tuning",
        ),
        about=665_000,
        rounded=1000,
        kinds=("image", "text"),
        exact={"image": 624_610, "text": 40_688},
        folders={"coco": 364_100, "gqa": 72_140, "ocr_vqa": 80_000, "textvqa": 21_953, "vg": 86_417},
        evidence="counted in https://github.com/haotian-liu/LLaVA/issues/657 and, by its author, in issues/702 and 546",
    ),
    "video-chatgpt-100k": PublishedSet(
        files=("VideoInstruct100K.json", "videos of ActivityNet named in docs/train_video_ids.txt"),
        pages=(
            "https://github.com/mbzuai-oryx/Video-ChatGPT",
            "https://huggingface.co/datasets/MBZUAI/VideoInstruct-100K",
        ),
        about=100_000,
        rounded=1000,
        kinds=("video",),
        evidence="the abstract of arXiv 2306.05424; train_video_ids.txt of its repository lists 13,303 videos",
    ),
    "llava-onevision-single-image": PublishedSet(
        files=("Parquet files of many subsets",),
        pages=("https://huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data",),
        about=3_200_000,
        rounded=100_000,
        kinds=("image", "text"),
        evidence="LLaVA-OneVision's own model page (3.2M single-image samples); LLaVA-Mini took a part, not said which",
    ),
}
"""By the names that ``llava-mini data check --published`` takes."""


def published_set(name: str) -> PublishedSet:
    """Return one of ``PUBLISHED_SETS``.

    Raises:
        ValueError: There is none of that name; the message lists the known ones.
    """
    if name not in PUBLISHED_SETS:
        raise ValueError(f"There is no published set {name!r}. The sets are: {', '.join(PUBLISHED_SETS)}.")
    return PUBLISHED_SETS[name]


_LEFTOVER = "\nQA_GT_caption_based_noisy"
"""What some answers of VideoInstruct100K.json end with: a mark of how they were made (its repository, issues/69)."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of the records of VideoInstruct100K.json."""

    num_records: int
    num_missing: int
    """Records whose video is not in the folder. They are kept, so that a check counts and names them."""
    num_cleaned: int
    """Answers whose leftover mark was taken off."""


def convert_video_instructions(source: Path, destination: Path, videos: Path) -> Converted:
    """Write VideoInstruct100K.json (a list of ``{"q", "a", "video_id"}``) as records of LLaVA.

    Args:
        source: The published file.
        destination: The JSON file to write. It appears when it is complete.
        videos: The folder of the videos, ``VIDEO_ID.mp4`` or with another suffix. A record without one names ``.mp4``.

    Raises:
        ValueError: The source holds something else, or there is no such folder.
    """
    if not videos.is_dir():
        raise ValueError(f"{str(videos)!r} is not a folder. Give the folder that holds the videos of ActivityNet.")
    names = {path.stem: path.name for path in sorted(videos.iterdir()) if path.is_file()}
    counts: Counter[str] = Counter()
    records = []
    for number, given in enumerate(_instructions(source)):
        question, answer, video = given["q"], given["a"], given["video_id"]
        counts["missing"] += video not in names
        counts["cleaned"] += answer.endswith(_LEFTOVER)
        turns = [("human", f"<video>\n{question}"), ("gpt", answer.removesuffix(_LEFTOVER))]
        records.append(
            {
                "id": f"{video}-{number}",
                "video": names.get(video, f"{video}.mp4"),
                "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
            }
        )
    draft = destination.with_name(f"{destination.name}.part")
    draft.write_text(json.dumps(records), encoding="utf-8")
    draft.replace(destination)
    return Converted(num_records=len(records), num_missing=counts["missing"], num_cleaned=counts["cleaned"])


def _instructions(source: Path) -> Sequence[Mapping[str, Any]]:
    try:
        records = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(source)!r} cannot be read as JSON ({error}). Was its download interrupted?") from error
    keys = ("q", "a", "video_id")
    listed = records if isinstance(records, list) else [records]
    for number, record in enumerate(listed):
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            raise ValueError(
                f"Record {number} of {str(source)!r} is not an object with texts under {', '.join(keys)}. Is it the "
                "published VideoInstruct100K.json? A file of LLaVA records needs no conversion."
            )
    return listed
