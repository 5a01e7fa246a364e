"""Other models as transformers has them, with random weights of their own sizes, before the same language model.

LLaVA-v1.5, LLaVA-NeXT, BLIP-2, InstructBLIP and Video-LLaVA put image tokens into the prompt of an ordinary
language model, so each is its own front end and shares that model with all others: its time differs by what it
does with the image and by how many tokens it makes of it. IDEFICS has layers of its own between the layers of
its language model, so it is built whole, in the size of that model.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from llava_mini.benchmarks.contestants import Answering, Contestant, LanguageModel, Words, branch
from llava_mini.benchmarks.sizes import made_on, settled
from llava_mini.benchmarks.timing import Laps
from llava_mini.config import LlavaMiniConfig
from llava_mini.model.head import read_whole

Sizes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a peer is built for."""

    config: LlavaMiniConfig
    """Ours: its CLIP tower and its language model are the sizes of theirs."""
    sizes: Sizes
    """Of what they have and we do not."""
    language: LanguageModel
    words: Words
    dtype: torch.dtype

    @property
    def small(self) -> int:
        """Pixels per side of the smaller pictures that some read."""
        return _small_side(self.config)

    def clip(self, image_size: int) -> CLIPVisionConfig:
        """Our tower for other pictures."""
        return _clip(self.config, image_size)

    def tower(self, name: str) -> dict[str, Any]:
        """Fields of a tower of another kind, for the smaller pictures."""
        return {**self.sizes[name], "image_size": self.small, "patch_size": self.config.patch_size}

    def one_layer(self) -> PreTrainedConfig:
        """The language model with one layer, for a front end whose language model is thrown away."""
        return _one_layer(self.config)


def _small_side(config: LlavaMiniConfig) -> int:
    """224 pixels where ours have 336."""
    patch = config.patch_size
    return 2 * config.image_size // 3 // patch * patch


def _clip(config: LlavaMiniConfig, image_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{**config.vision.to_dict(), "image_size": image_size})


def _one_layer(config: LlavaMiniConfig) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**config.text.to_dict(), "num_hidden_layers": 1})


class Peer:
    """A front end that does not read the question, before the shared language model."""

    def __init__(
        self, name: str, tower: nn.Module, image_tokens: Callable[[], Tensor], language: LanguageModel, words: Words
    ) -> None:
        self.name, self.language, self.words = name, language, words
        self.image_tokens = image_tokens
        self.laps: Laps | None = None
        tower.register_forward_hook(self._seen)
        self.tokens = image_tokens().shape[1]

    def first(self, laps: Laps) -> Answering:
        """Image tokens in the place of the image, then the language model."""
        self.laps = laps
        image = self.image_tokens()
        laps("reduction")
        self.laps = None
        kept, question = self.language.embed(self.words.kept), self.language.embed(self.words.question)
        answering = self.language.read(torch.cat([kept, image, question], dim=1))
        laps("prefill")
        return answering

    def keep(self) -> Any:
        """The language model after kept words and image."""
        return self.language.read(torch.cat([self.language.embed(self.words.kept), self.image_tokens()], dim=1))

    def later(self, kept: Any, laps: Laps) -> Answering:
        """The question's rows in the language model."""
        answering = self.language.read(self.language.embed(self.words.question), kept.cache)
        laps("prefill")
        return answering

    def step(self, answering: Answering) -> Answering:
        """One more token."""
        return self.language.step(answering)

    def _seen(self, *_: object) -> None:
        if self.laps is not None:
            self.laps("vision")


class InstructBlip(Peer):
    """Its image tokens read the question, so only vision and the words before the image can be kept."""

    def __init__(self, name: str, model: Any, pixels: Tensor, language: LanguageModel, words: Words) -> None:
        self.model, self.pixels = model, pixels
        vocabulary = model.config.qformer_config.vocab_size
        self.question = words.question.remainder(vocabulary - 1) + 1
        super().__init__(name, model.vision_model, lambda: self._tokens(self._vision()), language, words)

    def keep(self) -> tuple[Tensor, Answering | None]:
        """Vision, and the language model after the kept words."""
        kept = self.words.kept
        return self._vision(), (self.language.read(self.language.embed(kept)) if kept.shape[1] else None)

    def later(self, kept: tuple[Tensor, Answering | None], laps: Laps) -> Answering:
        """The Q-Former with the question, then image tokens and question in the language model."""
        vision, prefix = kept
        image = self._tokens(vision)
        laps("reduction")
        rows = torch.cat([image, self.language.embed(self.words.question)], dim=1)
        answering = self.language.read(rows, None if prefix is None else prefix.cache)
        laps("prefill")
        return answering

    def _vision(self) -> Tensor:
        return self.model.vision_model(pixel_values=self.pixels)[0]

    def _tokens(self, vision: Tensor) -> Tensor:
        return _queried(self.model, vision, self.question)


class Idefics:
    """Its image enters by cross-attention between the layers of its own language model, and costs no token there."""

    tokens = 0

    def __init__(self, name: str, model: Any, pixels: Tensor, words: Words) -> None:
        self.name, self.model, self.pixels, self.words = name, model, pixels, words
        self.laps: Laps | None = None
        self.image: Tensor | None = None
        model.model.vision_model.register_forward_hook(self._seen)
        model.model.perceiver_resampler.register_forward_hook(self._resampled)

    def first(self, laps: Laps) -> Answering:
        """Vision, resampler, and the language model with all words."""
        self.laps = laps
        ids = torch.cat([self.words.kept, self.words.question], dim=1)
        answering = self._read(ids, {"pixel_values": self.pixels})
        laps("prefill")
        self.laps = None
        return answering

    def keep(self) -> tuple[Tensor, Answering | None]:
        """The image's latents, and the language model after the kept words, which see the image too."""
        silent = Laps(device=self.pixels.device, by_part=False)
        self.first(silent)
        assert self.image is not None
        kept = self.words.kept
        return self.image, (self._read(kept, {"perceiver_embeddings": self.image}) if kept.shape[1] else None)

    def later(self, kept: tuple[Tensor, Answering | None], laps: Laps) -> Answering:
        """The question's words."""
        image, prefix = kept
        past = None if prefix is None else branch(prefix.cache)
        answering = self._read(self.words.question, {"perceiver_embeddings": image}, past)
        laps("prefill")
        return answering

    def step(self, answering: Answering) -> Answering:
        """One more token."""
        return self._read(answering.token, {"perceiver_embeddings": self.image}, answering.cache)

    def _read(self, ids: Tensor, image: Mapping[str, Tensor | None], past: Any = None) -> Answering:
        sees = torch.ones(*ids.shape, 1, dtype=torch.long, device=ids.device)
        out = self.model(
            input_ids=ids, image_attention_mask=sees, past_key_values=past, use_cache=True, logits_to_keep=1, **image
        )
        return Answering(token=out.logits[:, -1:].argmax(-1), cache=out.past_key_values)

    def _seen(self, *_: object) -> None:
        if self.laps is not None:
            self.laps("vision")

    def _resampled(self, _module: nn.Module, _inputs: object, latents: Tensor) -> None:
        self.image = latents[:, None]  # [1, images, latents, width]
        if self.laps is not None:
            self.laps("reduction")


def build_peers(
    config: LlavaMiniConfig, language: LanguageModel, words: Words, *, is_tiny: bool, dtype: torch.dtype
) -> tuple[list[Contestant], dict[str, str]]:
    """Build all peers on the device of the words.

    Args:
        config: our model.
        language: the language model that they share with it.
        words: the text of the prompts.
        is_tiny: towers and Q-Formers of a few layers, to try things out; otherwise they have their published sizes.
        dtype: the number format of all weights.

    Returns:
        The peers, and why others could not be built, by name.
    """
    sizes = _TINY if is_tiny else _PUBLISHED
    setting = Setting(config=config, sizes=sizes, language=language, words=words, dtype=dtype)
    built: list[Contestant] = []
    missing: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            with made_on(words.question.device, dtype), torch.inference_mode():
                built.append(build(name, setting))
        # Whatever a version of transformers stumbles over is told in the table, and the others run.
        except Exception as error:
            missing[name] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else _first_line(error)
        if missing:
            gc.collect()
            torch.cuda.empty_cache()
    return built, missing


def _llava(name: str, of: Setting) -> Contestant:
    side = of.config.image_size
    config = LlavaConfig(vision_config=of.clip(side), text_config=of.one_layer())
    inner = _front(LlavaForConditionalGeneration(config), of.dtype).model
    pixels = torch.randn(1, 3, side, side)
    return Peer(name, inner.vision_tower, lambda: _rows(inner.get_image_features(pixels)), of.language, of.words)


def _llava_next(name: str, of: Setting) -> Contestant:
    side = of.config.image_size
    config = LlavaNextConfig(
        vision_config=of.clip(side), text_config=of.one_layer(), image_grid_pinpoints=[[2 * side, 2 * side]]
    )
    inner = _front(LlavaNextForConditionalGeneration(config), of.dtype).model
    pixels = torch.randn(1, 5, 3, side, side)  # four crops and the whole image
    size = torch.tensor([[2 * side, 2 * side]], device="cpu")  # read as numbers: elsewhere it would drain the device
    return Peer(name, inner.vision_tower, lambda: _rows(inner.get_image_features(pixels, size)), of.language, of.words)


class VideoLlavaFront:
    """Video-LLaVA's front end for the frames of a film, which it takes all at once."""

    def __init__(self, config: LlavaMiniConfig, frames: int, device: torch.device, dtype: torch.dtype) -> None:
        """Build it with random weights.

        Args:
            config: ours: the tower has the sizes of its tower, and the tokens the width of its language model.
            frames: F.
            device: for weights and pixels.
            dtype: for both.
        """
        side = _small_side(config)
        with made_on(device, dtype):
            self.inner = _video_llava_front(config, dtype)
            self.pixels = torch.randn(1, frames, 3, side, side)
        self.laps = Laps(device=device, by_part=False)
        self.inner.video_tower.register_forward_hook(lambda *_: self.laps("vision"))

    @staticmethod
    def tokens_per_frame(config: LlavaMiniConfig) -> int:
        """All patches of the smaller picture, and the class token, which it keeps."""
        return (_small_side(config) // config.patch_size) ** 2 + 1

    def tokens(self, laps: Laps) -> Tensor:
        """[1, F * tokens_per_frame, D]."""
        self.laps = laps
        found = self.inner.get_video_features(self.pixels)
        laps("reduction")
        rows = getattr(found, "pooler_output", found)
        return rows.reshape(1, -1, rows.shape[-1])


def _video_llava(name: str, of: Setting) -> Contestant:
    inner = _video_llava_front(of.config, of.dtype)
    pixels = torch.randn(1, 3, of.small, of.small)
    return Peer(name, inner.image_tower, lambda: _rows(inner.get_image_features(pixels)), of.language, of.words)


def _video_llava_front(config: LlavaMiniConfig, dtype: torch.dtype) -> Any:
    made = VideoLlavaConfig(vision_config=_clip(config, _small_side(config)), text_config=_one_layer(config))
    return _front(VideoLlavaForConditionalGeneration(made), dtype).model


def _blip_2(name: str, of: Setting) -> Contestant:
    config = Blip2Config(
        vision_config=of.tower("eva"), qformer_config=dict(of.sizes["qformer"]), text_config=of.one_layer()
    )
    model = _front(Blip2ForConditionalGeneration(config), of.dtype)
    pixels = torch.randn(1, 3, of.small, of.small)

    def image_tokens() -> Tensor:
        return _queried(model, model.vision_model(pixel_values=pixels)[0], None)

    return Peer(name, model.vision_model, image_tokens, of.language, of.words)


def _instruct_blip(name: str, of: Setting) -> Contestant:
    config = InstructBlipConfig(
        vision_config=of.tower("eva"), qformer_config=dict(of.sizes["qformer"]), text_config=of.one_layer()
    )
    model = _front(InstructBlipForConditionalGeneration(config), of.dtype)
    return InstructBlip(name, model, torch.randn(1, 3, of.small, of.small), of.language, of.words)


def _idefics(name: str, of: Setting) -> Contestant:
    text: Any = of.config.text
    config = IdeficsConfig(
        vocab_size=text.vocab_size,
        additional_vocab_size=2,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        cross_layer_interval=4,
        qk_layer_norms=True,
        alpha_type="vector",
        use_resampler=True,
        pad_token_id=0,
        vision_config=of.tower("vit_h"),
        perceiver_config={**of.sizes["perceiver"], "use_resampler": True, "qk_layer_norms_perceiver": True},
    )
    model = settled(IdeficsForVisionText2Text(config), of.dtype)
    read_whole(model.lm_head)
    return Idefics(name, model, torch.randn(1, 1, 3, of.small, of.small), of.words)


PEERS: Mapping[str, Callable[[str, Setting], Contestant]] = {
    "LLaVA-v1.5": _llava,
    "LLaVA-NeXT, HD": _llava_next,
    "BLIP-2": _blip_2,
    "InstructBLIP": _instruct_blip,
    "Video-LLaVA": _video_llava,
    "IDEFICS": _idefics,
}
"""The largest is last, so that it takes no memory from the others where all do not fit."""

_PUBLISHED: Sizes = {
    "eva": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16},
    "vit_h": {"embed_dim": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
    "qformer": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "perceiver": {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96},
}
_TINY: Sizes = {
    "eva": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 4},
    "vit_h": {"embed_dim": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4},
    "qformer": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2},
    "perceiver": {"resampler_n_latents": 16, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 32},
}


def _front(model: Any, dtype: torch.dtype) -> Any:
    """The model without its own language model."""
    for holder in (model, getattr(model, "model", None)):
        for part in ("language_model", "lm_head"):
            if isinstance(getattr(holder, part, None), nn.Module):
                setattr(holder, part, nn.Identity())
    return settled(model, dtype)


def _queried(model: Any, vision: Tensor, question: Tensor | None) -> Tensor:
    """What a Q-Former makes of vision features [1, patches, E], with the question's ids if it reads them: [1, Q, D]."""
    queries = model.query_tokens.expand(vision.shape[0], -1, -1)
    asked = {}
    if question is not None:
        length = queries.shape[1] + question.shape[1]
        asked = {"input_ids": question, "attention_mask": question.new_ones(1, length)}
    out = model.qformer(
        query_embeds=queries,
        encoder_hidden_states=vision,
        encoder_attention_mask=torch.ones(vision.shape[:2], dtype=torch.long, device=vision.device),
        **asked,
    )
    return model.language_projection(out[0][:, : queries.shape[1]])


def _rows(found: Any) -> Tensor:
    """Image tokens [1, Q, D] from what ``get_image_features`` gives, which differs between versions."""
    features = getattr(found, "pooler_output", found)
    if isinstance(features, (list, tuple)):
        features = torch.cat(list(features))
    return features if features.dim() == 3 else features[None]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
