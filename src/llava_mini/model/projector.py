"""From vision width to language width: LLaVA-v1.5's ``mlp2x_gelu``, or what a reducer has in its place."""

from torch import Tensor, nn


class Projector(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """[..., E] to [..., D]."""
        return self.linear_2(self.activation(self.linear_1(features)))  # [..., D]


def build_projector(vision_width: int, language_width: int, *, is_linear: bool) -> nn.Module:
    """The projector of a model, by its reducer's ``has_linear_projector``."""
    if is_linear:
        return nn.Linear(vision_width, language_width, bias=False)
    return Projector(vision_width, language_width)
