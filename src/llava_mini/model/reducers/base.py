"""What a reducer is: it turns what the vision tower says of a frame into the tokens that stand for it.

A method is one class. What it is given and where it stands follow from the facts that it states about itself; all
default to what query-based compression does. What it costs is one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.inside import Inside, PromptRows


@dataclass(frozen=True)
class Reduced:
    """Reduced tokens of some frames."""

    tokens: Tensor
    """[F, Q, E]."""
    attention: Tensor | None = None
    """[F, Q, patches], rows sum to 1. None: no attention was used."""
    valid: Tensor | None = None
    """[F, Q] bool: the tokens that there are, where frames differ in their number. The others are left out of the
    prompt. None: all."""
    projected: Tensor | None = None
    """[F, some, D]: tokens that have language width already, and stand before the others. None: there are none."""


@dataclass(frozen=True)
class Question:
    """What is asked about each of some frames: the text of its prompt after the first frame, without answers."""

    embeds: Tensor
    """[F, N, D], packed to the left: words, or what the language model makes of them (``Reducer.reads_hidden``)."""
    valid: Tensor
    """[F, N] bool: the rows that are a question's own."""

    def take(self, rows: Tensor) -> "Question":
        """Return the questions with these numbers, [rows] int64."""
        return Question(self.embeds[rows], self.valid[rows])


@dataclass(frozen=True)
class TowerRead:
    """What a reducer reads of the vision tower besides the patches."""

    layers: Callable[[int], tuple[int, ...]]
    """Which hidden states, for a tower with so many layers: 0 is what enters the first layer, n leaves the n-th. The
    last layer is not run as a whole, so the largest is one less than the number of layers."""
    values: Callable[[CLIPVisionModel, tuple[Tensor, ...]], Tensor]
    """From these hidden states, each [F, 1 + N, E] with the class token first, to [F, N, width]."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a reducer takes, from the configuration alone, as ``model.cost`` counts: 2 for each multiply-add."""

    parameters: int = 0
    """All weights of the reducer, those included that never train."""
    shared: int = 0
    """Operations here that all frames share."""
    per_frame: int = 0
    """Operations here for each frame."""
    of_tower: int = 0
    """Operations here for each view of a frame, of what is read of the vision tower besides its layers."""
    mean_tokens: int | None = None
    """Tokens of a frame on average, as published, where frames differ in their number; they are then reduced again for
    each question. None: all frames have as many as they have places."""
    projected: int | None = None
    """Rows of a frame that the projector maps here, without those that pre-fusion reads. None: all its places."""
    published: int = 0
    """Operations for each frame in the code of the method's authors, counted as the paper counts."""
    published_projected: int | None = None
    """Rows of a frame that the projector maps there. None: all its tokens."""
    later_tokens: int | None = None
    """Rows of a frame in the language model's layers after ``reducer_layer``. None: all its tokens."""
    per_row: int = 0
    """Operations inside the language model for each row of a prompt with frames, besides those of its layers."""
    per_prompt: int = 0
    """The same for the prompt."""


class Reducer(nn.Module):
    """Turns the patches of each frame into its tokens: a forward of its own, and these facts.

    It is built from the configuration, which stays within reach: what a field says when frames are reduced holds.
    """

    reads: ClassVar[tuple[TowerRead, ...]] = ()
    """What it reads besides the patches. It stands after them, in this order, in the last dimension."""
    reads_projected: ClassVar[bool] = False
    """Whether it reads patches that were projected to language width, instead of being projected itself."""
    reads_question: ClassVar[bool] = False
    """Whether its tokens depend on what is asked. Its ``forward`` then takes a ``Question`` after the patches."""
    reads_hidden: ClassVar[bool] = False
    """Whether its ``Question`` holds the last hidden states of the language model, which reads it alone before,
    without gradients, instead of words."""
    has_linear_projector: ClassVar[bool] = False
    """Whether one linear map without bias takes the place of the two-layer projector."""
    keeps_patches: ClassVar[bool] = False
    """Whether its tokens are all patches, projected. Frames are then not given to its ``forward``."""
    acts_inside: ClassVar[bool] = False
    """Whether the language model has to be told about prompts, by ``inside``. No pre-fusion may come before it."""
    drops_inside: ClassVar[bool] = False
    """Whether it drops rows there. A prompt is then read at once, from its beginning: what is kept of one serves no
    other."""
    drops_in_training: ClassVar[bool] = True
    """Whether it does so while the model trains."""
    drops_alike: ClassVar[bool] = False
    """Whether the rows that it drops are the same whatever is asked about the frames."""

    def __init__(self, config: LlavaMiniConfig) -> None:
        super().__init__()
        self.config = config

    def init_weights(self) -> None:
        """Fill the parameters that are its own, not those of a layer, with ``transformers.initialization``."""

    @classmethod
    def cost(cls, config: LlavaMiniConfig, num_question_tokens: int) -> Cost:
        """What it takes with a question of so many tokens. By default nothing, as without weights."""
        return Cost()

    def inside(self, rows: PromptRows) -> Inside:
        """What is done to some prompts inside the language model. By default nothing."""
        return Inside()

    @property
    def is_ragged(self) -> bool:
        """Whether frames may differ in the number of their tokens."""
        return False

    @property
    def is_late(self) -> bool:
        """Whether frames are reduced only where the prompt is put together, so that no pre-fusion may follow."""
        return self.reads_question or self.is_ragged


def grid_side(patches: Tensor) -> int:
    """Side of the square grid that patches [F, N, E] form.

    Raises:
        ValueError: N is not a square number.
    """
    side = isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(
            f"A reducer needs a square grid of patches, got {patches.shape[1]} per frame. Did the class token stay in?"
        )
    return side


def as_picture(patches: Tensor) -> Tensor:
    """Lay patches out on their grid, as convolutions want them: [F, N, E] to [F, E, side, side].

    Raises:
        ValueError: N is not a square number.
    """
    side = grid_side(patches)
    return patches.transpose(1, 2).unflatten(2, (side, side))


def cell_means(patches: Tensor, grid: int) -> Tensor:
    """Cut the grid of patches into ``grid`` x ``grid`` cells and average each one: [F, N, E] to [F, grid * grid, E].

    Raises:
        ValueError: N is not a square number.
    """
    return functional.adaptive_avg_pool2d(as_picture(patches), grid).flatten(2).transpose(1, 2)


def take_rows(rows: Tensor, numbers: Tensor) -> Tensor:
    """Rows with these numbers of each frame: [F, N, E] and [F, K] int64 to [F, K, E]."""
    return rows.gather(1, numbers[..., None].expand(-1, -1, rows.shape[-1]))
