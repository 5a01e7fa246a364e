"""Pixels of a parity folder, which frames of a video are seen, and what the checks share."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava_mini.processor import (
    FrameSampling,
    LlavaMiniProcessor,
    ViewSettings,
    choose_frames,
    load_template,
    nearest_square,
    spread,
    to_rgb,
)
from llava_mini.processor.image import make_square, split_views
from tests.parity.result import Result

PIXELS = 1e-6
"""Tolerance of normalised pixels, which are float32 of order 1."""
SUMS = 1e-6
"""Relative tolerance of means and sums over all pixels."""
MODES = {"pad": "pad", "square": "center_crop"}
ANYRES = "by design: 'anyres' is refused; the released model read its output as a video"
TRAINING_ORDER = "mended: one order, split then pad; released training padded first, reproduced by doing so"
UNDER_A_SECOND = "mended: the released code divides by zero; ours takes one frame"


def check_images(folder: Path) -> Iterator[Result]:
    """Pixels in every mode, at every size, whole and split; sizes and sums of the parts."""
    about = read_json(folder, "images")
    stored = np.load(folder / "preprocess" / "images.npz")
    settings = about["processor"]
    defaults = {"resample": 3, "rescale_factor": 1 / 255, "convert_rgb": True, "crop": settings["size_shortest_edge"]}
    wrong = [name for name, value in defaults.items() if settings[name] != value]
    yield Result("processor", float(len(wrong)), 0, f"differ: {wrong}" if wrong else "")

    def pixels(image: np.ndarray, mode: str, ratio: int, size: int) -> np.ndarray:
        processor = make_processor(
            folder,
            first_tokenizer(folder),
            "plain",
            image_size=size,
            image_mode=MODES[mode],
            resolution_ratio=ratio,
            image_mean=settings["mean"],
            image_std=settings["std"],
        )
        return processor(text="<image>", images=image)["pixel_values"][0].numpy()  # [V, 3, S, S]

    pattern = re.compile(r"(img\d+|big)(\d*)(?:_split(\d+))?(?:_(infer|train))?_(pad|square|anyres)(?:_stride(\d+))?")
    for name in stored.files:
        found = pattern.fullmatch(name)
        if name in {source["image"] for source in about["items"]} | {"big"}:
            continue
        if not found:
            yield Result(name, float("inf"), PIXELS, "no rule for this array")
            continue
        source, size, ratio, phase, mode, stride = found.groups()
        image, size, ratio, step = stored[source], int(size or settings["crop"]), int(ratio or 1), int(stride or 1)
        if mode == "anyres":
            yield Result(name, refusal(lambda: ViewSettings(size=28, mode="anyres")), 0, ANYRES)  # type: ignore[arg-type]
            continue
        note = TRAINING_ORDER if phase == "train" else ""
        if phase == "train" and mode == "pad":
            square = ViewSettings(size=max(image.shape[:2]), mode="pad", mean=tuple(settings["mean"]))
            image, mode = np.asarray(make_square(to_rgb(image), square)), "square"
        ours = pixels(image, mode, ratio, size)[..., ::step, ::step]
        yield Result(name, difference(ours if found[3] else ours[0], stored[name]), PIXELS, note)
    for item in about["items"]:
        image = to_rgb(stored[item["image"]])
        wrong = float([*image.size] != item["size_wh"])
        yield Result(f"{item['image']}_size", wrong, 0)
        for key in item:
            if found := re.fullmatch(r"split(\d+)", key):
                parts = split_views(image, int(found[1]))
                ours = [{"size_wh": [*part.size], "sum": int(np.asarray(part, np.int64).sum())} for part in parts]
                yield Result(f"{item['image']}_{key}", float(ours != item[key]), 0)
            elif key not in ("image", "size_wh", "anyres_shape", "anyres_best_resolution_wh"):
                yield Result(f"{item['image']}_{key}", float("inf"), 0, "no rule for this entry")
    padded = make_square(
        Image.new("RGB", (2, 1), (255, 255, 255)), ViewSettings(size=2, mode="pad", mean=tuple(settings["mean"]))
    )
    background = float(list(padded.getpixel((0, 1)) or ()) != about["pad_background_rgb"])  # type: ignore[call-overload]
    yield Result("pad_background", background, 0)
    size = max(int(found[1]) for name in stored.files if (found := re.match(r"big(\d+)_", name)))
    for mode in set(about["big"]) - {"size_wh"}:
        ours, expected = pixels(stored["big"], mode, 1, size)[0], about["big"][mode]
        yield Result(f"big_{mode}_sums", sums_differ(ours, expected), SUMS)


def check_video(folder: Path) -> Iterator[Result]:
    """Chosen frames, the index rule, and the nearest-neighbour squash."""
    about = read_json(folder, "video")
    for clip in about["clips"]:
        total, fps = clip["total_frames"], clip["fps"]
        for scheme in set(clip) - {"total_frames", "fps"}:
            found = re.fullmatch(r"fixed(\d+)|one_fps(?:_cap(\d+))?", scheme)
            name = f"{total}_frames_at_{fps}_{scheme}"
            if not found:
                yield Result(name, float("inf"), 0, "no rule for this choice")
                continue
            sampling = (
                FrameSampling(num_frames=int(found[1]))
                if found[1]
                else FrameSampling(max_frames=int(found[2]) if found[2] else None)
            )
            ours = choose_frames(total, fps, sampling)
            if "raises" in clip[scheme]:
                yield Result(name, float(len(ours) != 1), 0, UNDER_A_SECOND)
            else:
                yield Result(name, count_differences(ours, clip[scheme]["indices"]), 0)
    for rule in about["seq_frames"]:
        ours = spread(rule["total"], rule["want"])
        yield Result(f"{rule['want']}_of_{rule['total']}", count_differences(ours, rule["indices"]), 0)
    for key in (key for key in about if key.startswith("frame_resize_nearest_")):
        size = int(key.rsplit("_", 1)[1])
        for shape, sources in about[key].items():
            height, width = (int(side) for side in shape.split("x"))
            rows, columns = np.mgrid[:height, :width]
            place = np.stack([rows % 256, columns % 256, rows // 256 + 16 * (columns // 256)], axis=-1)
            ours = np.asarray(nearest_square(Image.fromarray(place.astype(np.uint8)), size)).astype(int)  # [S, S, 3]
            ours_rows = ours[:, 0, 0] + 256 * (ours[:, 0, 2] % 16)
            ours_columns = ours[0, :, 1] + 256 * (ours[0, :, 2] // 16)
            yield Result(f"rows_of_{shape}", count_differences(ours_rows, sources["source_row_for_output_row"]), 0)
            yield Result(
                f"columns_of_{shape}", count_differences(ours_columns, sources["source_col_for_output_col"]), 0
            )
    for key in about:
        if key not in ("clips", "seq_frames") and not key.startswith("frame_resize_nearest_"):
            yield Result(key, float("inf"), 0, "no rule for this entry")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "preprocess" / f"{name}.json").read_text())


@cache
def tokenizer_of(folder: Path, name: str, *, legacy: bool = False) -> Any:
    return AutoTokenizer.from_pretrained(folder / "tokenizers" / name, **({"legacy": True} if legacy else {}))


def first_tokenizer(folder: Path) -> str:
    return min(path.name for path in (folder / "tokenizers").iterdir())


def is_llama(folder: Path, name: str) -> bool:
    """Whether a tokenizer has the control tokens of Llama 3."""
    return "<|start_header_id|>" in tokenizer_of(folder, name).get_added_vocab()


def make_processor(
    folder: Path, tokenizer: str, template: str, *, legacy: bool = False, **fields: Any
) -> LlavaMiniProcessor:
    known = tokenizer_of(folder, tokenizer, legacy=legacy)
    sizes = {"image_size": 8, "tokens_per_frame": 1, "image_token_id": len(known) + 1, **fields}
    return LlavaMiniProcessor(known, chat_template=load_template(template), **sizes)


def difference(ours: np.ndarray, stored: np.ndarray) -> float:
    if ours.shape != stored.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - stored.astype(np.float64)).max())


def count_differences(ours: Any, stored: Any) -> float:
    """How many numbers differ; inf for different lengths."""
    mine, theirs = torch.as_tensor(ours), torch.as_tensor(stored)
    return float((mine != theirs).sum()) if mine.shape == theirs.shape else float("inf")


def sums_differ(pixels: np.ndarray, stored: dict[str, Any]) -> float:
    """Largest relative difference of mean, standard deviation and absolute sum, those that are stored."""
    values = pixels.astype(np.float64)
    ours = {"mean": values.mean(), "std": values.std(ddof=1), "abs_sum": np.abs(values).sum()}
    return max(abs(ours[key] - stored[key]) / max(abs(stored[key]), 1) for key in ours if key in stored)


def refusal(call: Callable[[], Any]) -> float:
    """0 if the call raises ValueError, as it should."""
    try:
        call()
    except ValueError:
        return 0
    return float("inf")
