"""No reduction: every patch is a token, as in LLaVA-v1.5."""

from torch import Tensor

from llava_mini.model.reducers.base import Reduced, Reducer


class Identity(Reducer):
    """Keep all patches."""

    keeps_patches = True

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, P, E]."""
        return Reduced(patches)  # [F, P, E]
