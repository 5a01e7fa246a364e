"""No reduction: every patch is a token, as in LLaVA-v1.5."""

from torch import Tensor, nn

from llava_mini.model.reducers.base import Reduced


class Identity(nn.Module):
    """Keep all patches."""

    def forward(self, patches: Tensor) -> Reduced:
        """patches: [F, P, E]."""
        return Reduced(patches)  # [F, P, E]
