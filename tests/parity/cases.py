"""Model cases of a parity folder: every tensor in every case is compared, or named with its reason.

The released code takes ids with -200 for a medium and images apart; here they become what our
processor makes (Q image tokens per frame, frames of the batch in one tensor). Where a mended defect
makes the final numbers differ on purpose, the released numbers are still reproduced from the parts
(``read``, then the language model), and the line names the defect.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor, ModelInputs
from llava_mini.checkpoint.from_original import rename as rename_released
from llava_mini.model import splice
from llava_mini.model.vision import join_crops
from tests.parity.result import Result

TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 1e-3
"""Relative, for norms and elements of gradients."""
PLACEHOLDER = -200

TEXT_ONLY = "mended: text-only prompts are not fused with an all-zero image; released rows composed from read()"
NO_TOKEN = "mended: a video in training inserts its tokens; released rows composed from read()"
NO_GRADIENT = "mended: a stacked video trains the vision side too"
NO_CUT = "mended: a prompt beyond the context is refused, not cut; compared after cutting"
EMBEDDINGS = "mended: the embedding table is trained in stage 2"
DESIGN = "by design: patch rows of the last pre-fusion layer are not computed, the others are compared"


def load_model(folder: Path) -> LlavaMiniForConditionalGeneration:
    """A model of the parity format through ``from_pretrained``; tensors given by a formula are made first."""
    recipe = folder / "recipe.json"
    if not recipe.exists():
        return LlavaMiniForConditionalGeneration.from_pretrained(folder).eval()
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("config.json", "vision_config.json"):
            (Path(temporary) / name).write_text((folder / name).read_text())
        tensors = load_file(folder / "model.safetensors")
        for name, entry in json.loads(recipe.read_text())["tensors"].items():
            tensors[name] = formula(entry["seed"], entry["shape"], entry["scale"])
        save_file(tensors, Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        return LlavaMiniForConditionalGeneration.from_pretrained(temporary).eval()


def formula(seed: int, shape: list[int], scale: float) -> Tensor:
    """A tensor given by the integer hash of the folder's README."""
    index = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + index * np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float64) / 2**24
    values = (2 * uniform - 1).astype(np.float32) * np.float32(scale)
    return torch.from_numpy(values.reshape(shape))


@dataclass(frozen=True)
class Case:
    """One case: what went in, what must come out, and what our model reads."""

    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]
    inputs: ModelInputs
    lengths: list[int]
    """Real ids of each prompt, the placeholder counted as one."""
    frames: list[Tensor]
    """All frames that the released code saw, for each prompt: [frames, V, 3, H, W]."""
    has_place: list[bool]

    @property
    def training(self) -> bool:
        return self.about["mode"] == "train"


def read_case(path: Path, model: LlavaMiniForConditionalGeneration) -> Case:
    about, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    ids, labels = tensors["in/input_ids"], tensors.get("in/labels")
    mask = tensors.get("in/attention_mask", torch.ones_like(ids))
    frames = _frames(tensors, len(ids))
    override = about["config_override"] or {}
    if unknown := set(override) - {"tokenizer_padding_side", "tokenizer_model_max_length"}:
        raise ValueError(f"{path.stem} overrides {sorted(unknown)}, which this check does not know.")
    rows, used, has_place = [], [], []
    for b in range(len(ids)):
        row = ids[b, mask[b].bool()]
        target = labels[b, mask[b].bool()] if labels is not None else torch.full_like(row, -100)
        place = row == PLACEHOLDER
        has_place.append(bool(place.any()))
        if has_place[-1]:
            used.append(frames[b])
        copies = torch.where(place, len(frames[b]) * model.config.tokens_per_frame, 1)
        row = row.masked_fill(place, model.config.image_token_id or 0).repeat_interleave(copies)
        rows.append((row, target.repeat_interleave(copies)))
    width = max(len(row) for row, _ in rows)
    batch = {name: torch.full((len(rows), width), fill) for name, fill in (("ids", 0), ("mask", 0), ("labels", -100))}
    for b, (row, target) in enumerate(rows):
        left = override.get("tokenizer_padding_side") == "left"
        place = slice(width - len(row), width) if left else slice(0, len(row))
        batch["ids"][b, place], batch["mask"][b, place], batch["labels"][b, place] = row, 1, target
    inputs = ModelInputs(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        pixel_values=torch.cat(used) if used else None,
        labels=batch["labels"] if labels is not None else None,
    )
    return Case(path.stem, about, tensors, inputs, mask.sum(1).tolist(), frames, has_place)


def _frames(tensors: dict[str, Tensor], num_prompts: int) -> list[Tensor]:
    if "in/images" in tensors:
        return [image if image.dim() == 5 else image[None] for image in tensors["in/images"]]
    named = [tensors.get(f"in/images/{b}", torch.empty(0)) for b in range(num_prompts)]
    return [image[None] if image.dim() == 4 else image for image in named]


def check_case(case: Case, model: LlavaMiniForConditionalGeneration, tokenizer: Path) -> list[Result]:
    """Compare everything that the case stores."""
    checks = _Checks(case)
    _check_ids(case, model, tokenizer, checks)
    _check_calls(case, model, checks)
    _check_outputs(case, model, checks)
    if case.training:
        _check_gradients(case, model, checks)
    left = sorted(set(case.tensors) - checks.seen)
    checks.add("coverage", float(len(left)), note=f"not compared: {', '.join(left)}" if left else "", tolerance=0)
    return checks.results


class _Checks:
    def __init__(self, case: Case) -> None:
        self.case, self.results = case, list[Result]()
        self.seen = {name for name in case.tensors if name.startswith("in/")}

    def add(self, name: str, error: float, *, tolerance: float = TOLERANCE, note: str = "") -> None:
        self.results.append(Result(f"{self.case.name}/{name}", error, tolerance, note))

    def compare(self, name: str, ours: Tensor, *, rows: Tensor | None = None, note: str = "") -> None:
        """Largest difference to the stored tensor, over the given leading positions."""
        stored = self.case.tensors[name]
        self.seen.add(name)
        if ours.shape != stored.shape:
            self.add(name, float("inf"), note=f"shape {tuple(ours.shape)}, stored {tuple(stored.shape)}")
            return
        difference = (ours.double() - stored.double()).abs()
        if rows is not None:
            difference = difference[rows]
        self.add(name, difference.max().item() if difference.numel() else 0.0, note=note)


def _check_ids(case: Case, model: LlavaMiniForConditionalGeneration, folder: Path, checks: _Checks) -> None:
    """The processor gives the stored ids for the stored prompts, and generation keeps its side of padding."""
    if not case.about["prompts"]:
        checks.add("prompts", 0.0, tolerance=0, note="no prompt is stored as text")
        return
    size = model.config.image_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = case.tensors["in/input_ids"][0].tolist()
    begin = next(n for n, one in enumerate(first) if one != tokenizer.bos_token_id)
    processor = LlavaMiniProcessor.from_config(model.config, tokenizer, template="plain", num_begin_tokens=begin)
    wrong = by_hand = 0
    for b, text in enumerate(case.about["prompts"]):
        media = [np.zeros((size, size, 3), np.uint8)] * len(case.frames[b])
        output = processor(text=text, videos=[media] if "<image>" in text else None)
        ours = output["input_ids"][0]
        stored = case.inputs.input_ids[b][case.inputs.attention_mask[b] == 1].tolist()  # type: ignore[index]
        by_hand += sum(0 == one != other for one, other in zip(stored, ours, strict=False))
        wrong += len(ours) != len(stored) or any(one not in (0, other) for one, other in zip(stored, ours, strict=True))
    note = f"{by_hand} stored ids were set to 0, which the text does not give" if by_hand else ""
    checks.add("prompts", float(wrong), tolerance=0, note=note)


def _calls(case: Case) -> Iterator[tuple[int, list[int], Tensor]]:
    """Each run of reducer and pre-fusion in the released code: its number, its prompts and their frames."""
    total = case.about["fusion_calls"]
    if case.about["images_form"] == "list":
        pairs = [([b], frame[None]) for b, frames in enumerate(case.frames) for frame in frames]
    else:
        prompts = list(range(len(case.frames)))
        pairs = [(prompts, torch.stack(frames)) for frames in zip(*case.frames, strict=True)] if total else []
    assert len(pairs) == total, f"{case.name} has {total} calls, {len(pairs)} were found"
    for index, (prompts, frames) in enumerate(pairs):
        yield index, prompts, frames


@torch.no_grad()
def _check_calls(case: Case, model: LlavaMiniForConditionalGeneration, checks: _Checks) -> None:
    for index, prompts, frames in _calls(case):
        stored = {name.split("/", 2)[2] for name in case.tensors if name.startswith(f"out/call{index}/")}
        ours = _call(case, model, prompts, frames)
        real = torch.zeros(len(prompts), case.tensors["in/input_ids"].shape[1], dtype=torch.bool)
        for row, b in enumerate(prompts):
            real[row] = case.tensors.get("in/attention_mask", torch.ones_like(case.tensors["in/input_ids"]))[b].bool()
        num_vision = ours["num_vision"]
        vision_rows = torch.ones(len(prompts), num_vision, dtype=torch.bool)
        for name in sorted(stored):
            key = f"out/call{index}/{name}"
            if name in ("prefusion_token_visible", "prefusion_position_ids"):
                checks.compare(key, ours[name], rows=torch.cat([vision_rows, real], dim=1))
            elif name == "prefusion_in":
                checks.compare(key, ours[name], rows=torch.cat([vision_rows, real & ours["fusible"]], dim=1))
            elif name == "prefusion_out":
                outputs = vision_rows.clone()
                outputs[:, : num_vision - model.config.tokens_per_frame] = False
                checks.compare(key, ours[name], rows=torch.cat([outputs, real & ours["fusible"]], dim=1), note=DESIGN)
            elif name == "fused_text":
                checks.compare(key, ours[name], rows=real)
            else:
                checks.compare(key, ours[name])


def _released_text(case: Case, model: LlavaMiniForConditionalGeneration) -> tuple[Tensor, Tensor]:
    """Plain embeddings [B, L, D] of the released ids, placeholders as id 0, and which are fused [B, L]."""
    ids = case.tensors["in/input_ids"]
    mask = case.tensors.get("in/attention_mask", torch.ones_like(ids))
    labels = case.tensors.get("in/labels")
    image = model.config.image_token_id or 0
    inputs = ModelInputs(input_ids=ids.masked_fill(ids == PLACEHOLDER, image), attention_mask=mask, labels=labels)
    visible = splice.fusible(
        inputs,
        image_token_id=image,
        fuse_token_id_zero=model.config.fuse_token_id_zero,
        fuse_answers=model.config.fuse_answers,
    )
    return model.get_input_embeddings()(ids.clamp(min=0)), visible


def _call(case: Case, model: LlavaMiniForConditionalGeneration, prompts: list[int], frames: Tensor) -> dict[str, Any]:
    """Everything that one run of the released front end stores, from our parts."""
    config = model.config
    embeds, visible = (part[prompts] for part in _released_text(case, model))
    features = model.encode_frames(frames)
    grid, _ = join_crops(features, config.resolution_ratio)
    reduction = model.reducer(grid)
    patches, reduced = model.reduce_frames(features)
    assert patches is not None
    packed = splice.pack(embeds, visible)
    fused = model.read(patches, reduced, packed.embeds)
    assert fused.vision is not None
    assert fused.text is not None
    every = torch.ones(len(prompts), dtype=torch.bool)
    text = splice.unpack(embeds, fused.text, packed, every)
    num_vision = patches.shape[1] + reduced.shape[1]
    seen = torch.cat([torch.ones(len(prompts), num_vision, dtype=torch.bool), visible], dim=1)
    unknown = torch.zeros(len(prompts), patches.shape[1], config.text.hidden_size)
    return {
        "clip_features": features,
        "compressor_out": reduction.tokens,
        "compressor_attn": reduction.attention,
        "projected_compressed": reduced,
        "projected_global": patches[:, -features.shape[2] :],
        "compressed_tokens": fused.vision,
        "fused_text": text,
        "prefusion_token_visible": seen.to(torch.uint8),
        "prefusion_position_ids": torch.where(seen, seen.long().cumsum(1) - 1, 1),
        "prefusion_in": torch.cat([patches, reduced, embeds], dim=1),
        "prefusion_out": torch.cat([unknown, fused.vision, text], dim=1),
        "num_vision": num_vision,
        "fusible": visible,
    }


def _released_rows(case: Case, model: LlavaMiniForConditionalGeneration, embeds: Tensor) -> Tensor:
    """Our embeddings with the rows of prompts without a place replaced by what the released code made."""
    for b, has in enumerate(case.has_place):
        if has or not len(case.frames[b]):
            continue
        texts = [_call(case, model, [b], frame[None])["fused_text"][0] for frame in case.frames[b]]
        keep = case.inputs.attention_mask[b].bool()  # type: ignore[index]
        rows = torch.stack(texts).mean(0)[: case.lengths[b]]
        embeds = embeds.index_put((torch.full((case.lengths[b],), b), keep.nonzero()[:, 0]), rows)
    return embeds


def _check_outputs(case: Case, model: LlavaMiniForConditionalGeneration, checks: _Checks) -> None:
    stored, inputs = case.tensors, case.inputs
    mended = any(not has and len(case.frames[b]) for b, has in enumerate(case.has_place))
    note = (NO_TOKEN if case.training and all(not has for has in case.has_place) else TEXT_ONLY) if mended else ""
    limit = (case.about["config_override"] or {}).get("tokenizer_model_max_length")
    with torch.no_grad():
        fused = model.fuse(inputs)
        if mended:
            _check_mended_rows(case, model, fused.inputs_embeds, checks, note)
        embeds = _released_rows(case, model, fused.inputs_embeds)
        mask, labels = fused.attention_mask, fused.labels
        if limit is not None and limit < embeds.shape[1]:
            embeds, mask, note = embeds[:, :limit], mask[:, :limit], NO_CUT
        real = mask.bool()
        if "out/inputs_embeds" in stored:
            checks.compare("out/inputs_embeds", embeds, rows=real, note=note)
        if "out/attention_mask_out" in stored:
            checks.compare("out/attention_mask_out", mask, note=note)
        if "out/labels_out" in stored and labels is not None:
            checks.compare("out/labels_out", labels, note=note)
        if "out/logits" in stored:
            logits = model(inputs_embeds=embeds, attention_mask=mask).logits
            checks.compare("out/logits", logits, rows=real, note=note)
            if not mended and limit is None:
                direct = model(**{k: v for k, v in vars(inputs).items() if v is not None}).logits
                checks.compare("out/logits", direct, rows=real, note="through forward(pixel_values)")
        if "out/loss" in stored:
            loss = model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
            checks.compare("out/loss", loss[None], note=note)
            checks.add("loss in the description", abs(loss.item() - case.about["loss"]), note=note)
            if not mended:
                direct = model(**{k: v for k, v in vars(inputs).items() if v is not None}).loss
                checks.compare("out/loss", direct[None], note="through forward(pixel_values, labels)")
                supervised = float((labels != -100).sum()) if labels is not None else 0.0
                checks.add("supervised tokens", abs(supervised - case.about["supervised_tokens"]), tolerance=0)
        if "out/generated" in stored:
            steps = stored["out/generated"].shape[1]
            output = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                pixel_values=inputs.pixel_values,
                max_new_tokens=steps,
                do_sample=False,
                eos_token_id=None,
            )
            assert isinstance(output, Tensor)
            margin = case.about["greedy_min_margin"]
            checks.compare("out/generated", output[:, -steps:], note=f"greedy, smallest margin {margin:.1e}")


def _check_mended_rows(
    case: Case, model: LlavaMiniForConditionalGeneration, embeds: Tensor, checks: _Checks, note: str
) -> None:
    """What we do instead: a prompt without a place for its frames is the plain language model's."""
    for b, has in enumerate(case.has_place):
        if not has and len(case.frames[b]):
            keep = case.inputs.attention_mask[b].bool()  # type: ignore[index]
            plain = model.get_input_embeddings()(case.inputs.input_ids[b, keep])
            checks.add(f"prompt {b} is not fused", (embeds[b, keep] - plain).abs().max().item(), note=note)


def _check_gradients(case: Case, model: LlavaMiniForConditionalGeneration, checks: _Checks) -> None:
    """Gradients of the loss, with everything but the vision encoder trained."""
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_tower."))
    fused = model.fuse(case.inputs)
    embeds = _released_rows(case, model, fused.inputs_embeds)
    model(inputs_embeds=embeds, attention_mask=fused.attention_mask, labels=fused.labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name in sorted(n for n in case.tensors if n.startswith("out/grad/")):
        ours, stored = gradients[rename_released(name.removeprefix("out/grad/"))], case.tensors[name]
        checks.seen.add(name)
        error = float("inf") if ours is None else ((ours - stored).abs().max() / stored.abs().max().clamp(min=1)).item()
        checks.add(name, error)
    unequal, more = [], []
    for name, norm in case.about["grad_norm_params"].items():
        ours = gradients[rename_released(name)]
        if norm is None:
            if ours is not None:
                more.append(name)
        elif ours is None or abs(ours.norm().item() - norm) > GRADIENT_TOLERANCE * max(norm, 1e-3):
            unequal.append(name)
    checks.add("gradient norms", float(len(unequal)), tolerance=0, note=f"differ: {unequal}" if unequal else "")
    extra = [name for name in more if name != "model.embed_tokens.weight"]
    video = any(len(frames) > 1 for frames in case.frames)
    notes = [EMBEDDINGS] * (len(more) > len(extra)) + [NO_GRADIENT] * bool(extra)
    vision_side = ("model.mm_projector.", "model.compressor.", "model.prefusion_layers.")
    odd = [name for name in extra if not (video and name.startswith(vision_side))]
    checks.add("gradients the released code lacks", float(len(odd)), tolerance=0, note="; ".join(notes))
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        if gradient is not None:
            groups.setdefault(_group(name), []).append(gradient)
    for group, norm in case.about["grad_norm_groups"].items():
        if norm is not None:
            ours = torch.stack([g.norm() for g in groups[group]]).norm().item()
            checks.add(f"gradient norm of {group}", abs(ours - norm) / norm, tolerance=GRADIENT_TOLERANCE)
        elif group == "vision_tower":
            checks.add("gradients of vision_tower", float(len(groups.get(group, []))), tolerance=0)


GROUPS = {
    "language_model.model.embed_tokens": "embed_tokens",
    "language_model.model.layers": "llm_layers",
    "language_model.model.norm": "final_norm",
    "language_model.lm_head": "lm_head",
    "projector": "mm_projector",
    "reducer.queries": "compressor_query",
    "reducer.query_codes": "compressor_pos_embed",
    "reducer.attend": "compressor_attn",
    "reducer.query_norm": "compressor_norms",
    "reducer.patch_norm": "compressor_norms",
    "prefusion": "prefusion_layers",
    "vision_tower": "vision_tower",
}


def _group(name: str) -> str:
    return next(group for prefix, group in GROUPS.items() if name.startswith(prefix))


def check(folder: Path) -> Iterator[Result]:
    """All cases of a folder, model by model."""
    models = {path.name: path for path in sorted((folder / "models").iterdir()) if path.is_dir()}
    cases = sorted((folder / "cases").glob("*.json"))
    named = {path: json.loads(path.read_text())["model"] for path in cases}
    for name, path in models.items():
        mine = [case for case in cases if named[case] == name]
        try:
            model = load_model(path)
            tokenizer = folder / "tokenizers" / json.loads((path / "meta.json").read_text())["tokenizer"]
        except (OSError, ValueError, KeyError) as error:
            yield Result(f"model {name}", float("inf"), 0, f"cannot be loaded: {error}")
            continue
        for case in mine:
            try:
                yield from check_case(read_case(case, model), model, tokenizer)
            except (OSError, ValueError, KeyError, IndexError, AssertionError, RuntimeError) as error:
                yield Result(case.stem, float("inf"), 0, f"{type(error).__name__}: {error}")
        if not mine:
            yield Result(f"model {name}", float("inf"), 0, "has no case")
    left = [path.stem for path, name in named.items() if name not in models]
    left += [path.stem for path in (folder / "cases").glob("*.safetensors") if not path.with_suffix(".json").exists()]
    yield Result("cases without a model or a description", float(len(left)), 0, ", ".join(left))
