"""A LLaVA-Mini to be analysed, whatever its reducer and pre-fusion: the all-token model is one of them."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn

from llava_mini.analysis.canvas import Canvas, Paint, grid_paint, looking_paint, picture_of
from llava_mini.analysis.fusion import FusionWatch
from llava_mini.analysis.kernels import kernel_in
from llava_mini.analysis.samples import Asked
from llava_mini.analysis.subject import Prompted, QueryLook, Subject
from llava_mini.analysis.words import words_of
from llava_mini.flow import FrameChunk, SeenChunk
from llava_mini.inference.torch_backend import generate_batch, stop_ids
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers import Reduced
from llava_mini.processor.processor import LlavaMiniProcessor


def our_subject(
    name: str,
    model: LlavaMiniForConditionalGeneration,
    processor: LlavaMiniProcessor,
    *,
    num_frames: int | None,
    num_shown: int,
) -> Subject:
    """Make a model ready to be analysed.

    Args:
        name: What it is called.
        model: On its device.
        processor: The model's.
        num_frames: Frames of each video, evenly spread. None: one per second of a file, and all of a list of frames.
        num_shown: Frames of a prompt of which pictures and maps are kept.

    Raises:
        ValueError: The reducer drops rows inside the language model.
    """
    config = model.config
    if model.reducer.drops_inside:
        raise ValueError(
            f"The reducer {config.reducer!r} of {name!r} drops rows inside the language model, so its layers do not "
            "have the same tokens to attend to. Analyse the model with reducer 'identity', or another one."
        )
    front = _FrontEnd(model.eval(), processor, num_frames, num_shown)
    return Subject(
        name=name,
        family="LLaVA-Mini",
        decoder=model.language_model.get_decoder(),
        stop_ids=tuple(sorted(stop_ids(model))),
        tokenizer=processor.tokenizer,
        prompt=front.prompt,
        reads_videos=True,
        context=config.text.max_position_embeddings,
        details={
            "reducer": config.reducer,
            "tokens per frame": config.tokens_per_frame,
            "patches per frame": config.patches_per_frame,
            "pre-fusion layers": config.prefusion_num_layers,
        },
    )


_GRIDS = ("average_pool", "m3")
"""Reducers whose tokens are a grid of equal squares of the picture, without attention that would say so."""

_AFTER_PATCHES = ("voco",)
"""Reducers that give all patches as tokens, and others after them."""


class _FrontEnd:
    """From a question to what the language model reads."""

    def __init__(
        self,
        model: LlavaMiniForConditionalGeneration,
        processor: LlavaMiniProcessor,
        num_frames: int | None,
        num_shown: int,
    ) -> None:
        self.model, self.processor = model, processor
        self.num_frames, self.num_shown = num_frames, num_shown

    @torch.inference_mode()
    def prompt(self, asked: Asked) -> Prompted:
        """Fuse a question with its frames, watching.

        Raises:
            ValueError: The prompt is longer than the model's context.
        """
        model, device = self.model, self.model.device
        is_list = any(isinstance(part.get("video"), list) for part in asked.messages[-1]["content"])
        inputs = self.processor.stream(
            asked.messages,
            num_frames=self.num_frames,
            all_frames=self.num_frames is None and is_list,
        )
        assert inputs.attention_mask is not None
        assert inputs.answer_mask is not None
        stream, kept = inputs.pixel_values, list[Tensor]()
        assert stream is not None
        assert not isinstance(stream, Tensor)

        def tapped() -> Iterator[FrameChunk | SeenChunk]:
            for chunk in stream:
                assert isinstance(chunk, FrameChunk)
                kept.extend(chunk.pixel_values[: max(self.num_shown - len(kept), 0)])
                yield chunk

        inputs = replace(
            inputs,
            input_ids=inputs.input_ids.to(device),
            attention_mask=inputs.attention_mask.to(device),
            answer_mask=inputs.answer_mask.to(device),
            pixel_values=tapped(),
        )
        watch = None
        if model.prefusion is not None:
            watch = FusionWatch(model, model.text_rows(inputs), self.num_shown)
        looks = _Looks(self.num_shown)
        hook = model.reducer.register_forward_hook(looks.note)
        try:
            with nullcontext() if watch is None else kernel_in(model.language_model, watch.kernel()):
                fused = model.fuse(inputs)
        finally:
            hook.remove()
        length, context = fused.inputs_embeds.shape[1], model.config.text.max_position_embeddings
        if length >= context:
            raise ValueError(
                f"The prompt of {asked.name!r} has {length} tokens, but the model's context holds {context}, one of "
                "them for the answer. Give fewer frames: --frames."
            )
        per_frame = 0 if model.config.vision_tokens_from == "nowhere" else model.config.tokens_per_frame
        tokens_of_frames = (looks.counts if per_frame else []) or [per_frame] * fused.num_frames[0]
        pictures, tokenizer = [self._pictures(views) for views in kept], self.processor.tokenizer
        ids, is_vision = fused.input_ids[0], fused.input_ids[0] == model.config.image_token_id
        after = ~is_vision & (is_vision.cumsum(0) > 0)
        return Prompted(
            embeds=fused.inputs_embeds[0].to(model.dtype),
            is_vision=is_vision,
            words=tuple(words_of(ids, after, tokenizer)),
            tokens_of_frames=tokens_of_frames,
            write=lambda max_tokens: generate_batch(model, fused, max_tokens=max_tokens, temperature=0.0)[0][0],
            arguments=lambda: dict(model.inside(fused)),
            canvases=tuple(
                canvas
                for frame, views in enumerate(pictures)
                for canvas in self._canvases(frame, views, tokens_of_frames, looks)
            ),
            fusion=None if watch is None else watch.reads(tokenizer),
            looks=tuple(
                QueryLook(picture=views[0], maps=maps.unflatten(1, (isqrt(maps.shape[1]), -1)))
                for views, maps in zip(pictures, looks.maps, strict=False)
            ),
        )

    def _pictures(self, views: Tensor) -> list[np.ndarray]:
        """What a frame [V, 3, H, W] shows: its detailed picture, and in HD the whole one after it."""
        mean, deviation = self.processor.image_mean, self.processor.image_std
        pictures = [picture_of(view, mean, deviation) for view in views]
        ratio = self.model.config.resolution_ratio
        if ratio == 1:
            return pictures
        rows = [np.concatenate(pictures[row * ratio : (row + 1) * ratio], axis=1) for row in range(ratio)]
        return [np.concatenate(rows), pictures[-1]]

    def _canvases(
        self, frame: int, pictures: list[np.ndarray], tokens_of_frames: list[int], looks: "_Looks"
    ) -> Iterator[Canvas]:
        """The pictures of a frame, with the places of its vision tokens in them."""
        config, first = self.model.config, sum(tokens_of_frames[:frame])
        side, small, count = config.reduced_side, config.patches_per_side, tokens_of_frames[frame]
        paint: Paint | None = None
        if count <= 1:
            paint = None  # a single token has no places to choose from
        elif self.model.reducer.keeps_patches or config.reducer in _AFTER_PATCHES:
            paint = grid_paint(first, side, side)
        elif config.reducer in _GRIDS:
            paint = grid_paint(first, config.reducer_grid, config.reducer_grid)
        elif frame < len(looks.maps):
            paint = looking_paint(first, looks.maps[frame])
        yield Canvas(title=f"frame {frame + 1}", picture=pictures[0], paint=paint)
        if len(pictures) > 1 and count == side**2 + small**2:
            whole = grid_paint(first + side**2, small, small)
            yield Canvas(title=f"frame {frame + 1}, whole", picture=pictures[1], paint=whole)


class _Looks:
    """Notes how many tokens a reducer makes of each frame, and keeps its attention over the first ones."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.maps: list[Tensor] = []
        """[tokens, patches] of each frame; empty for a reducer without attention."""
        self.counts: list[int] = []
        """Tokens of each frame."""

    def note(self, _: nn.Module, __: tuple[object, ...], reduced: Reduced) -> None:
        num_frames, num_tokens = reduced.tokens.shape[:2]
        num_tokens += 0 if reduced.projected is None else reduced.projected.shape[1]
        valid = torch.ones(num_frames, num_tokens, dtype=torch.bool) if reduced.valid is None else reduced.valid.cpu()
        self.counts += valid.sum(1).tolist()
        if reduced.attention is not None:
            shown = reduced.attention[: max(self.most - len(self.maps), 0)].float().cpu()
            self.maps += [frame[kept] for frame, kept in zip(shown, valid, strict=False)]
