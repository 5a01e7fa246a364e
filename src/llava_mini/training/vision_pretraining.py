"""Training a CLIP vision encoder from nothing, on what each patch shows.

A CLIP encoder is trained on captions of hundreds of millions of pictures. In a drawn world the
answer is known for every patch, so the encoder learns from dense labels in minutes: shape, colour,
size, centre of the thing, value of a bar, letter, and the word with its spelling. As in LLaVA, features are the
output of the last-but-one layer; the last layer is stored and never run.

CLIP also learns one token for the whole picture, from its caption. Here that token is made by the reducer of
LLaVA-Mini, which learns, together with the encoder, to keep which things there are and where: averages of patches
alone forget which colour belongs to which place.
"""

import random
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from llava_mini.config import LlavaMiniConfig
from llava_mini.data.collate import MAX_NAMES
from llava_mini.data.synthetic.drawing import LABEL_CLASSES, draw_scene, patch_labels
from llava_mini.data.synthetic.questions import near_miss
from llava_mini.data.synthetic.scenes import (
    CANVAS,
    COLOURS,
    SHAPES,
    Scene,
    SceneSettings,
    random_page,
    random_scene,
)
from llava_mini.data.synthetic.splits import generator_of
from llava_mini.model.positions import sine_cosine_2d
from llava_mini.model.reducers import Reduced
from llava_mini.model.vision import encode_views
from llava_mini.training.auxiliary import FrameHead
from llava_mini.training.trainer import Losses

NOTHING_WEIGHT = 0.3
"""Weight of the patches that show nothing, against those that show something."""

FRAME_WEIGHT = 2.0
"""Weight of what the token of a whole picture tells, against each of the labels of patches."""


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """A batch of pictures with labels for each patch."""

    pixels: Tensor
    """[F, H, W, 3] uint8."""
    labels: dict[str, Tensor]
    """[F, P] int64 for each name of ``LABEL_CLASSES``."""


@dataclass(frozen=True, kw_only=True)
class NamedThings:
    """Names of things that some pictures show, and as many of things that they do not. M pairs."""

    pictures: Tensor
    """[M] int64: which picture."""
    names: Tensor
    """[M, 2] int64: index in ``COLOURS``, and in ``SHAPES``."""
    present: Tensor
    """[M] int64: 1 where the picture shows such a thing."""
    places: Tensor
    """[M, 2] float32: x and y, as shares of width and height; 0 where there is none."""


@dataclass(frozen=True, kw_only=True)
class VisionBatch:
    """The pictures of a step."""

    pictures: LabelledPictures
    things: NamedThings


class DenseVisionModel(nn.Module):
    """A CLIP vision encoder with one linear head for each label, and a reducer with a head of its own."""

    def __init__(self, config: LlavaMiniConfig, reducer: nn.Module) -> None:
        super().__init__()
        width = config.vision.hidden_size
        self.tower = CLIPVisionModel._from_config(config.vision, attn_implementation="eager")
        with torch.no_grad():
            codes = sine_cosine_2d(config.patches_per_side, width)  # [P, E]
            self.tower.embeddings.position_embedding.weight[1:] = 0.5 * codes
            nn.init.normal_(self.tower.embeddings.patch_embedding.weight, std=0.05)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, sum(LABEL_CLASSES.values()))
        self.reducer = reducer
        self.colours = nn.Embedding(len(COLOURS), width)
        self.shapes = nn.Embedding(len(SHAPES), width)
        self.of_frame = FrameHead(width)

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits of each label: [F, P, E] -> [F, P, classes]."""
        logits = self.heads(self.norm(features)).float()
        return dict(zip(LABEL_CLASSES, logits.split(tuple(LABEL_CLASSES.values()), dim=-1), strict=True))

    def frame_loss(self, features: Tensor, things: NamedThings) -> Tensor:
        """Return the loss on what the mean of the reduced tokens tells about names. features: [F, P, E]."""
        reduced = self.reducer(features)
        assert isinstance(reduced, Reduced)
        frames = reduced.tokens.mean(1)[things.pictures]  # [M, E]
        names = self.colours(things.names[:, 0]) + self.shapes(things.names[:, 1])  # [M, E]
        return self.of_frame(frames, names, things.present, things.places)


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return pictures as CLIP reads them. pixels: [F, H, W, 3] uint8 -> [F, 3, H, W]."""
    values = pixels.permute(0, 3, 1, 2).float().div_(255)
    mean, std = (values.new_tensor(value).view(1, 3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return values.sub_(mean).div_(std).to(dtype)


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy over patches that show something, and a share of that over the others.

    Args:
        logits: [F, P, classes].
        labels: [F, P] int64; 0 is nothing.
    """
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    shown = (labels.flatten() > 0).float()
    mean_shown = (losses * shown).sum() / shown.sum().clamp(min=1)
    return mean_shown + NOTHING_WEIGHT * (losses * (1 - shown)).sum() / (1 - shown).sum().clamp(min=1)


def vision_losses(model: DenseVisionModel, batch: VisionBatch) -> Losses:
    """Return the sum of the losses of all labels and of frames, and the share of patches that are right for some."""
    features = encode_views(model.tower, normalised(batch.pictures.pixels, model.heads.weight.dtype))
    logits, labels = model.logits(features), batch.pictures.labels
    dense = torch.stack([dense_loss(logits[name], labels[name]) for name in LABEL_CLASSES]).sum()
    frame = model.frame_loss(features, batch.things)
    accuracies = {
        name: float((logits[name].argmax(-1) == labels[name])[labels[name] > 0].float().mean())
        for name in ("shape", "colour", "character", "word", "letter 3", "column", "value")
        if (labels[name] > 0).any()
    }
    return Losses(
        total=dense + FRAME_WEIGHT * frame,
        parts={"dense": float(dense.detach()), "frame": float(frame.detach())},
        right=accuracies,
    )


@dataclass(frozen=True, kw_only=True)
class VisionBatches:
    """The pictures of each step. Stands apart from the model, so that other processes can draw, too."""

    num_steps: int
    batch_size: int
    settings: SceneSettings
    pages: tuple[float, float]
    """Share of pages of letters, at the first step and at the last."""
    patch_size: int

    def __call__(self, step: int) -> VisionBatch:
        """Return the pictures of a step."""
        first, last = self.pages
        share_of_pages = first + (last - first) * step / self.num_steps
        scenes: list[Scene] = []
        named: list[NamedThings] = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            rng = generator_of("train", index, "vision")
            page = rng.random() < share_of_pages
            scenes.append(random_page(rng) if page else random_scene(rng, self.settings))
            named.append(named_things(rng, scenes[-1], len(named)))
        things = NamedThings(
            **{part.name: torch.cat([getattr(one, part.name) for one in named]) for part in fields(NamedThings)}
        )
        return VisionBatch(pictures=labelled(scenes, self.patch_size), things=things)


class VisionPretraining:
    """The task of the first phase: dense labels of pages of letters and of scenes, in shares that change.

    And what whole pictures show, from their reduced tokens.
    """

    def __init__(
        self,
        config: LlavaMiniConfig,
        reducer: nn.Module,
        *,
        num_steps: int,
        batch_size: int,
        dtype: torch.dtype,
        settings: SceneSettings,
        pages: tuple[float, float] = (0.8, 0.2),
    ) -> None:
        """Make the model.

        Args:
            config: Sizes of the encoder and its patches.
            reducer: With fresh weights; learns together with the encoder.
            num_steps: Steps of the phase, over which scenes replace pages.
            batch_size: Pictures of a step.
            dtype: Precision of weights and arithmetic.
            settings: What the scenes hold.
            pages: Share of pages of letters among the pictures, at the first step and at the last.
        """
        self.module = DenseVisionModel(config, reducer).to(dtype)
        self.make_batch = VisionBatches(
            num_steps=num_steps,
            batch_size=batch_size,
            settings=settings,
            pages=pages,
            patch_size=config.patch_size,
        )

    def losses(self, batch: VisionBatch) -> Losses:
        """Return the losses on the pictures of a step."""
        return vision_losses(self.module, batch)


def named_things(rng: random.Random, scene: Scene, picture: int) -> NamedThings:
    """Return the things of a scene that have a name of their own, and as many names that nothing has.

    A scene with more than ``MAX_NAMES`` of them asks too much of one token, and is left out.

    Args:
        rng: Draws the names that nothing has.
        scene: The scene.
        picture: Its row in the batch.
    """
    things = scene.unique_things if len(scene.unique_things) <= MAX_NAMES else ()
    names = [(thing.colour, thing.shape) for thing in things]
    while len(names) < 2 * len(things):
        colour, _, shape = near_miss(rng, scene.things).rpartition(" ")
        if colour:
            names.append((colour, shape))
    places = [(thing.x / CANVAS, thing.y / CANVAS) for thing in things] + [(0.0, 0.0)] * len(things)
    colours = tuple(COLOURS)
    ids = [(colours.index(colour), SHAPES.index(shape)) for colour, shape in names]
    return NamedThings(
        pictures=torch.full((len(names),), picture),
        names=torch.tensor(ids, dtype=torch.long).view(-1, 2),
        present=torch.tensor([1] * len(things) + [0] * len(things), dtype=torch.long),
        places=torch.tensor(places, dtype=torch.float32).view(-1, 2),
    )


def labelled(scenes: list[Scene], patch_size: int) -> LabelledPictures:
    """Draw scenes and label their patches."""
    labels = [patch_labels(scene, patch_size) for scene in scenes]
    return LabelledPictures(
        pixels=torch.from_numpy(np.stack([np.asarray(draw_scene(scene)) for scene in scenes])),
        labels={name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in LABEL_CLASSES},
    )
