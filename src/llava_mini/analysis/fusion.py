"""Pre-fusion while it reads: what the text attends to, and which patches each word reads.

Frames come one after another and are averaged over, as their fused text is; only of the first ones the maps are kept.

Shapes: F frames that are shown, T text tokens, P patches, Q reduced tokens, L layers of pre-fusion.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llava_mini.analysis.attention_stats import AttentionRecorder
from llava_mini.analysis.kernels import Kernel, Listener, watching
from llava_mini.analysis.subject import FusionReads
from llava_mini.analysis.words import TINY, WordReads, words_of
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.prefusion import PrefusionLayer
from llava_mini.model.splice import TextRows

TEXTS = ("before the image", "after the image")
"""Rows that are told apart."""

SOURCES = ("patches", "compressed", "text")
"""What they read: patches, the frame's compressed tokens if these pass through pre-fusion, and text before them."""


class FusionWatch:
    """Listens to pre-fusion while one prompt is fused with its frames."""

    def __init__(self, model: LlavaMiniForConditionalGeneration, text: TextRows, num_shown: int) -> None:
        """Begin without any frame.

        Args:
            model: With pre-fusion.
            text: Of one prompt.
            num_shown: Frames of which the maps are kept.
        """
        config = model.config
        assert model.prefusion is not None
        compressed = config.vision_tokens_from == "prefusion" and not model.reducer.keeps_patches
        self._num_patches = config.patches_per_frame
        self._num_vision = self._num_patches + (config.tokens_per_frame if compressed else 0)
        self._modules: list[nn.Module] = [
            cast(PrefusionLayer, layer).block.self_attn for layer in model.prefusion.layers
        ]
        visible, is_image = text.visible[0], text.is_image[0]
        self._ids = text.ids[0][visible]  # [T]
        self._after = (is_image.cumsum(0) > 0)[visible]  # [T]
        vision = torch.zeros(self._num_vision, dtype=torch.bool, device=visible.device)
        patches = vision.clone()
        patches[: self._num_patches] = True
        no_text = torch.zeros_like(self._after)
        rows = [torch.cat([vision, ~self._after]), torch.cat([vision, self._after])]
        keys = [torch.cat([patches, no_text]), torch.cat([~patches, no_text]), torch.cat([vision, ~no_text])]
        self._recorder = AttentionRecorder(torch.stack(rows), torch.stack(keys), len(self._modules))
        self._maps = torch.zeros(num_shown, len(self._modules), len(self._ids), self._num_patches)
        self._seen = [0] * len(self._modules)
        self._side = config.resolution_ratio * config.patches_per_side

    def kernel(self) -> Kernel:
        """Return the kernel with which the model has to fuse."""
        return watching({module: self._listener(layer) for layer, module in enumerate(self._modules)})

    def _listener(self, layer: int) -> Listener:
        tell = self._recorder.listener(layer)

        def listen(position: int, weights: Tensor) -> None:
            """Weights [frames, rows, keys]; those of vision rows are of no interest here."""
            if position < self._num_vision:
                return
            tell(position, weights)
            first, row = self._seen[layer], position - self._num_vision
            shown = weights[: max(len(self._maps) - first, 0), :, : self._num_patches]
            self._maps[first : first + len(shown), layer, row : row + weights.shape[1]] = shown.float().cpu()
            if position + weights.shape[1] == weights.shape[2]:  # the last rows of these frames
                self._seen[layer] += len(weights)

        return listen

    def reads(self, tokenizer: PreTrainedTokenizerBase) -> FusionReads:
        """Return what was read."""
        shown = self._maps[: min(self._seen[0], len(self._maps))]  # [F, L, T, P]
        words = []
        for word in words_of(self._ids, self._after, tokenizer):
            read = shown[:, :, list(word.places)].mean(2)  # [F, L, P]
            share = read.sum(2)
            grid = (read / share[..., None].clamp(min=TINY))[..., : self._side**2]
            words.append(WordReads(word=word.text, share=share, maps=grid.unflatten(2, (self._side, self._side))))
        return FusionReads(stats=self._recorder.stats(), words=tuple(words))
