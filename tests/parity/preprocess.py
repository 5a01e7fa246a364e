"""Preprocessing of a parity folder: pixels, frame choice, prompts, ids, labels and dataset items.

``check`` goes through every entry of every file in ``preprocess/`` with the processor. Where a mended
defect makes ours differ, the released numbers are reproduced in another way if there is one, and
the line says so. An entry that no rule here knows is a failure.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini.processor import LlavaMiniProcessor, load_template
from tests.parity.pixels import (
    PIXELS,
    SUMS,
    check_images,
    check_video,
    count_differences,
    difference,
    is_llama,
    make_processor,
    read_json,
    refusal,
    sums_differ,
    tokenizer_of,
)
from tests.parity.result import Result

PLACEHOLDER = -200
IGNORED = -100

EMPTY_QUESTION = "mended: an empty question is refused; the stored prompt is compared without asking for an answer"
WITHIN_TEXT = "the placeholder stands within the text; a part is followed by a new line, so it is given as text"
EMPTY_ANSWER = "mended: an empty answer keeps its end token; the released code drops it, reproduced by dropping it"
VIDEO_TOKEN = "mended: a video inserts its tokens; released ids reproduced by typing the placeholder as text"
ALL_MASKED = "mended: the released code masks every label when its count is off; ids compared, ours teach the answers"
ANSWER_FIRST = "the released code drops what comes before the first question, and so does this check"
PLAIN = "the released 'plain' drops the question; this check gives the image alone"
REFUSED = "by design: the released code asserts one image and two turns; ours renders any conversation"
UNREADABLE = "mended: an unreadable video is an error; the released code made 8 black frames"
NO_IMAGE = "mended: text alone has no pixels; the released code made an all-zero image"
LENGTHS = "by design: batches here have one of four kinds, and length in bytes; there, text and video were one group"

TEMPLATES = {
    "llava_v1": "llava_v1",
    "v1": "vicuna_v1",
    "vicuna_v1": "vicuna_v1",
    "llava_llama_3_1": "llama_3_1",
    "plain": "plain",
}
LABEL_TEMPLATES = {"llama_3_1": "llama_3_1", "v1": "llava_v1", "plain": "plain"}
"""The released training takes the system text of ``llava_v1`` for ``v1``."""


def check(folder: Path) -> Iterator[Result]:
    """All results of the folder's ``preprocess/`` files."""
    rules: dict[str, Callable[[Path], Iterator[Result]]] = {
        "images": check_images,
        "video": check_video,
        "prompts": check_prompts,
        "tokenize_image_token": check_ids,
        "label_masks": check_labels,
        "dataset_items": check_items,
    }
    for path in sorted((folder / "preprocess").iterdir()):
        if path.stem not in rules:
            yield Result(f"preprocess/{path.name}", float("inf"), 0, "no rule for this file")
    for name, rule in rules.items():
        if (folder / "preprocess" / f"{name}.json").exists():
            for result in rule(folder):
                yield Result(f"{name}/{result.name}", result.error, result.tolerance, result.note)
        else:
            yield Result(name, float("inf"), 0, "the file is missing")


def check_prompts(folder: Path) -> Iterator[Result]:
    """Prompt strings, character by character."""
    about = read_json(folder, "prompts")
    for name, template in about["templates"].items():
        if name not in TEMPLATES:
            yield Result(f"system_text_of_{name}", float("inf"), 0, "no such template here")
        else:
            text = load_template(TEMPLATES[name])
            yield Result(f"system_text_of_{name}", float(template["system"] not in text), 0)
    for index, item in enumerate(about["items"]):
        template, _, variant = item["template"].partition(":")
        name = f"{index:02d}_{item['template']}_{item['form']}"
        if template not in TEMPLATES or variant not in ("", "conditional_header"):
            yield Result(name, float("inf"), 0, "no such template here")
            continue
        texts = [text for text in (item["question"], item["question2"]) if text is not None]
        typed = any("<image>" in part.get("text", "") for text in texts for part in _user(text)["content"])
        turns = [_user(item["question"], typed=typed)]
        turns += [_assistant(item["answer"])] if item["answer"] is not None else []
        turns += [_user(item["question2"], typed=typed)] if item["question2"] is not None else []
        always = template == "llava_llama_3_1" and not variant
        header = not variant and (always or turns[-1]["role"] == "user")
        processor = make_processor(folder, _tokenizer_for(folder, TEMPLATES[template]), TEMPLATES[template])
        empty = turns[-1]["role"] == "user" and not turns[-1]["content"][-1].get("text", "").strip()
        if header and empty:
            refused = refusal(lambda p=processor, t=turns: p.apply_chat_template(t, add_generation_prompt=True))
            turns.append(_assistant("?"))
            ours = str(processor.apply_chat_template(turns)).rpartition("?")[0]
            same = ours.startswith(item["prompt"])
            yield Result(name, max(refused, float(not same)), 0, EMPTY_QUESTION)
            continue
        ours = processor.apply_chat_template(turns, add_generation_prompt=header)
        yield Result(name, float(ours != item["prompt"]), 0, WITHIN_TEXT if typed else "")


def check_ids(folder: Path) -> Iterator[Result]:
    """Ids of texts with placeholders. The released code adds one begin token to those in the text."""
    for index, item in enumerate(read_json(folder, "tokenize_image_token")["items"]):
        begin = tokenizer_of(folder, item["tokenizer"]).bos_token
        found = len(re.match(f"(?:{re.escape(begin)})*", item["text"])[0]) // len(begin)  # type: ignore[index]
        processor = make_processor(folder, item["tokenizer"], "plain", num_begin_tokens=1 + found)
        black = [np.zeros((8, 8, 3), np.uint8)] * item["text"].count("<image>")
        ours = _released(processor(text=item["text"], images=black or None)["input_ids"][0], processor)
        yield Result(f"{index:02d}_{item['tokenizer']}", count_differences(ours, item["ids"]), 0)


def check_labels(folder: Path) -> Iterator[Result]:
    """Ids and labels of conversations."""
    for index, item in enumerate(read_json(folder, "label_masks")["items"]):
        template = item["template"]
        found = re.fullmatch(r"(.*?)(?:_(conditional_header|legacy_tokenizer))?", template)
        base, variant = found[1], found[2] or ""  # type: ignore[index]
        name = f"{index:02d}_{template}_{item['kind']}"
        if base not in LABEL_TEMPLATES:
            yield Result(name, float("inf"), 0, "no such template here")
            continue
        legacy = variant == "legacy_tokenizer"
        processor = make_processor(folder, item["tokenizer"], LABEL_TEMPLATES[base], legacy=legacy)
        roles = [role for role, _ in item["conversation"]]
        turns = list(zip(roles, item["after_placeholder_rewrite"], strict=True))
        if "raises" in item:
            rendered = processor.apply_chat_template(_messages(turns))
            yield Result(name, float(not rendered), 0, REFUSED)
            continue
        yield from _check_conversation(name, processor, turns, item, base, variant)


def _check_conversation(
    name: str,
    processor: LlavaMiniProcessor,
    turns: list[tuple[str, str]],
    stored: dict[str, Any],
    base: str,
    variant: str,
) -> Iterator[Result]:
    """One conversation's ids and labels, and for a video its own slot."""
    notes = []
    if turns[0][0] != "human" and base != "plain":
        turns = turns[next(i for i, (role, _) in enumerate(turns) if role == "human") :]
        notes.append(ANSWER_FIRST)
    header = base == "llama_3_1" and not variant
    if turns[-1] == ("gpt", "") and base != "plain":
        turns, header = turns[:-1], base != "llama_3_1" or not variant
        notes.append(EMPTY_ANSWER)
    if base == "plain":
        notes.append(PLAIN)
    as_text = stored.get("kind") == "video" and base != "plain"
    messages = _messages(turns, typed=as_text, plain=base == "plain")
    ids, labels = _ids_and_labels(processor, messages, header)
    if as_text:
        notes.append(VIDEO_TOKEN)
        _, with_slot = _ids_and_labels(processor, _messages(turns), header)
        same = [label for label in with_slot if label != IGNORED] == [label for label in labels if label != IGNORED]
        yield Result(f"{name}_slot", float(not same), 0, "the same answers are taught when the video has its tokens")
    yield Result(f"{name}_ids", count_differences(ids, stored["input_ids"]), 0, "; ".join(notes))
    if all(label == IGNORED for label in stored["labels"]) and any(label != IGNORED for label in labels):
        taught = sum(label != IGNORED for label in labels)
        answered = any(role == "gpt" for role, _ in turns)
        yield Result(f"{name}_labels", float(not answered or taught == len(labels)), 0, ALL_MASKED)
    else:
        yield Result(f"{name}_labels", count_differences(labels, stored["labels"]), 0, "; ".join(notes))


def check_items(folder: Path) -> Iterator[Result]:
    """Complete training items and batches of them."""
    about = read_json(folder, "dataset_items")
    stored = np.load(folder / "preprocess" / "dataset_items.npz")
    unseen = set(stored.files) - {"source_image"}
    group: list[dict[str, Any]] = []
    collated = False
    for index, item in enumerate(about["items"]):
        if "sample" in item:
            kept = ("tokenizer", "resolution_ratio")
            if collated or any(member[key] != item[key] for member in group for key in kept):
                group, collated = [], False
            group.append(item)
            name = f"{index:02d}_{item['tokenizer']}_ratio{item['resolution_ratio']}_{item['sample']['id']}"
            yield from _check_item(folder, name, item, stored, unseen)
        elif "collate_of" in item:
            collated = True
            yield from _check_batch(folder, f"{index:02d}_batch", item, group, stored["source_image"])
        elif "modality_lengths" in item:
            yield Result(f"{index:02d}_modality_lengths", 0, 0, LENGTHS)
        else:
            yield Result(f"{index:02d}", float("inf"), 0, "no rule for this entry")
    yield Result("arrays", float(len(unseen)), 0, f"not compared: {sorted(unseen)}" if unseen else "")


def _item_processor(folder: Path, item: dict[str, Any], size: int) -> LlavaMiniProcessor:
    template = "llama_3_1" if is_llama(folder, item["tokenizer"]) else "llava_v1"
    return make_processor(
        folder,
        item["tokenizer"],
        template,
        image_size=size,
        resolution_ratio=item["resolution_ratio"],
        image_mode="center_crop",
        frame_resize="nearest",
    )


def _check_item(folder: Path, name: str, item: dict[str, Any], stored: Any, unseen: set[str]) -> Iterator[Result]:
    sample, ratio, size = item["sample"], item["resolution_ratio"], item["image_shape"][-1]
    processor = _item_processor(folder, item, size)
    base = "llama_3_1" if is_llama(folder, item["tokenizer"]) else "v1"
    kind = "video" if "video" in sample else "image"
    yield from _check_conversation(name, processor, _turns(sample), {**item, "kind": kind}, base, "")
    medium = _medium(sample, stored["source_image"])
    if medium is None:
        note = NO_IMAGE if kind == "image" else UNREADABLE
        if kind == "image":
            output = processor(text="no image")
            yield Result(f"{name}_pixels", float("pixel_values" in output), 0, note)
        else:
            yield Result(
                f"{name}_pixels", refusal(lambda: processor(text="<video>", videos=[sample["video"]])), 0, note
            )
        return
    output = (
        processor(text="<image>", images=[medium])
        if kind == "image"
        else processor(text="<video>", videos=[medium], num_frames=item["image_shape"][0])
    )
    pixels = output["pixel_values"].numpy()
    pixels = pixels[0] if kind == "image" else pixels
    yield Result(f"{name}_shape", float([*pixels.shape] != item["image_shape"]), 0)
    expected = {"mean": item["image_mean"], "abs_sum": item["image_abs_sum"]}
    yield Result(f"{name}_sums", sums_differ(pixels, expected), SUMS)
    for key in (f"ratio{ratio}_image", f"ratio{ratio}_video_first_frames"):
        if key in stored.files and (kind in key):
            unseen.discard(key)
            yield Result(f"{name}_pixels", difference(pixels[: len(stored[key])], stored[key]), PIXELS)


def _check_batch(
    folder: Path, name: str, item: dict[str, Any], group: list[dict[str, Any]], source: np.ndarray
) -> Iterator[Result]:
    """A collated batch: padded at the right; frames of all prompts in one tensor."""
    members = [group[index] for index in item["collate_of"]]
    processor = _item_processor(folder, item, members[0]["image_shape"][-1])
    conversations = []
    for member in members:
        medium, kind = _medium(member["sample"], source), "video" if "video" in member["sample"] else "image"
        conversations.append(_messages(_turns(member["sample"]), medium, kind))
    videos = [member["image_shape"][0] for member in members if "video" in member["sample"]]
    if "pad_token_id" in item:
        processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(item["pad_token_id"])
    output = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_labels=True,
        padding_side="right",
        add_generation_prompt=is_llama(folder, item["tokenizer"]),
        num_frames=max(videos, default=None),
    )
    if "input_ids" in item:
        for key in ("input_ids", "labels", "attention_mask"):
            ours = output[key].clone()
            if key == "input_ids":
                ours[ours == processor.image_token_id] = PLACEHOLDER
            yield Result(f"{name}_{key}", count_differences(ours.flatten(), np.array(item[key]).flatten()), 0)
    shapes = item["images"] if isinstance(item["images"][0], list) else [item["images"][1:]] * item["images"][0]
    frames = [1 if len(shape) == 4 else shape[0] for shape in shapes]
    texts = sum("image" not in m["sample"] and "video" not in m["sample"] for m in members)
    expected = (sum(frames) - texts, *shapes[0][-4:])
    note = NO_IMAGE if texts else "frames of the batch in one tensor instead of a list"
    yield Result(f"{name}_pixels", float(tuple(output["pixel_values"].shape) != expected), 0, note)


def _medium(sample: dict[str, Any], source: np.ndarray) -> Any:
    """What a sample shows. A video's name says frames, width and height; None if it cannot be read."""
    if "image" in sample:
        return source
    found = re.fullmatch(r"vid_n(\d+)_fps[\d.]+_w(\d+)_h(\d+)\.\w+", sample.get("video", ""))
    if not found:
        return None
    count, width, height = (int(number) for number in found.groups())
    frames, rows, columns = np.mgrid[:count, :height, :width]
    return np.stack([rows, columns, frames], axis=-1).astype(np.uint8)  # [F, H, W, 3]


def _user(text: str, medium: Any = None, kind: str = "image", *, typed: bool = False) -> dict[str, Any]:
    """A question; placeholders on lines of their own in front of it become parts unless they are meant as typed."""
    parts: list[dict[str, Any]] = []
    while not typed and (found := re.match(r"<image>(?:\n|$)", text)):
        parts.append({"type": kind, kind: medium} if medium is not None else {"type": kind})
        text = text[found.end() :]
        if not text and not found[0].endswith("\n"):
            return {"role": "user", "content": parts}
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _turns(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """A sample's turns after the released rewriting: one placeholder, in front of its turn."""
    turns = []
    for turn in sample["conversations"]:
        text = turn["value"].replace("<video>", "<image>")
        if "<image>" in text:
            text = f"<image>\n{text.replace('<image>', '').strip()}".strip()
        turns.append((turn["from"], text))
    return turns


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _messages(
    turns: list[tuple[str, str]], medium: Any = None, kind: str = "image", *, typed: bool = False, plain: bool = False
) -> list[dict[str, Any]]:
    messages = [_user(text, medium, kind, typed=typed) if role == "human" else _assistant(text) for role, text in turns]
    for message in messages:
        if plain and message["role"] == "user":
            message["content"] = message["content"][:-1]
    return messages


def _ids_and_labels(
    processor: LlavaMiniProcessor, messages: list[dict[str, Any]], header: bool
) -> tuple[list[int], list[int]]:
    count = sum(part["type"] != "text" for m in messages if m["role"] == "user" for part in m["content"])
    output = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_labels=True,
        add_generation_prompt=header,
        images=[np.zeros((8, 8, 3), np.uint8)] * count or None,
    )
    return _released(output["input_ids"][0], processor), output["labels"][0]


def _released(ids: list[int], processor: LlavaMiniProcessor) -> list[int]:
    return [PLACEHOLDER if token == processor.image_token_id else token for token in ids]


def _tokenizer_for(folder: Path, template: str) -> str:
    """The tokenizer that knows the template's control tokens."""
    names = sorted(path.name for path in (folder / "tokenizers").iterdir())
    return next(name for name in names if is_llama(folder, name) == (template == "llama_3_1"))
