"""Records of the drawn world, one for each index of a split."""

import random
from dataclasses import dataclass, field

from llava_mini.data.records import Noun, Record, Turn
from llava_mini.data.synthetic.clips import ask_about_clip, describe_clip, nouns_of, random_clip
from llava_mini.data.synthetic.drawing import draw_scene
from llava_mini.data.synthetic.questions import ask, describe, noun_of
from llava_mini.data.synthetic.scenes import Scene, SceneSettings, Split, generator_of, random_scene

IMAGE_KINDS = {
    "existence": 1.0,
    "colour": 1.0,
    "shape": 1.0,
    "count": 1.0,
    "location": 1.5,
    "relation": 1.5,
    "size": 1.0,
    "compare": 1.5,
    "text": 1.5,
    "absence": 0.3,
    "caption": 0.2,
}
"""How often each kind of question about an image is asked, relative to the others."""

CLIP_KINDS = {"direction": 1.5, "moving": 1.0, "change": 1.0, "clip colour": 0.5, "clip caption": 0.1}
"""How often each kind of question about a clip is asked, relative to the others."""


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What records of the world hold."""

    scene: SceneSettings = field(default_factory=SceneSettings)
    image_kinds: dict[str, float] = field(default_factory=lambda: dict(IMAGE_KINDS))
    clip_kinds: dict[str, float] = field(default_factory=lambda: dict(CLIP_KINDS))
    clip_share: float = 0.0
    """Share of records that are about a clip."""
    min_turns: int = 1
    max_turns: int = 1
    """Questions about the same picture; those that it does not allow are left out."""
    min_frames: int = 3
    max_frames: int = 5


@dataclass(frozen=True, kw_only=True)
class WorldItem:
    """What a record is made of, before anything is drawn."""

    frames: tuple[Scene, ...]
    """One scene for an image, several for a clip."""
    description: str
    """Everything that is to be seen, in words."""
    turns: tuple[Turn, ...]
    things: tuple[Noun, ...]
    """Things with a name of their own that are there from beginning to end."""

    def record(self) -> Record:
        """Draw the frames."""
        pictures = tuple(draw_scene(scene) for scene in self.frames)
        if len(pictures) == 1:
            return Record(turns=self.turns, image=pictures[0], things=self.things)
        return Record(turns=self.turns, video=pictures, things=self.things)


def world_item(split: Split, index: int, settings: WorldSettings, stream: str = "record") -> WorldItem:
    """Return the item at an index, the same at every call.

    Args:
        split: Which split; items of different splits come from different random numbers.
        index: Which item, from 0.
        settings: What it holds.
        stream: Separates items that are drawn for different purposes.
    """
    rng = generator_of(split, index, stream)
    num_turns = rng.randint(settings.min_turns, settings.max_turns)
    if rng.random() < settings.clip_share:
        clip = random_clip(rng, num_frames=rng.randint(settings.min_frames, settings.max_frames))
        kinds = _kinds(rng, settings.clip_kinds, num_turns)
        frames, description = clip.frames, describe_clip(clip)
        things = tuple(noun for index in range(len(frames[0].things)) for noun in nouns_of(clip, index))
        found = [ask_about_clip(rng, clip, kind, split) for kind in kinds]
    else:
        scene = random_scene(rng, settings.scene)
        kinds = _kinds(rng, settings.image_kinds, num_turns)
        frames, description = (scene,), describe(scene)
        things = tuple(noun_of(thing.name, thing) for thing in scene.unique_things)
        found = [ask(rng, scene, kind, split) for kind in kinds]
    turns = {turn.question: turn for turn in found if turn is not None}
    if not turns:
        return world_item(split, index, settings, stream + "+")
    return WorldItem(frames=frames, description=description, turns=tuple(turns.values()), things=things)


def world_record(split: Split, index: int, settings: WorldSettings, stream: str = "record") -> Record:
    """Return the item at an index, drawn. The arguments are those of ``world_item``."""
    return world_item(split, index, settings, stream).record()


def _kinds(rng: random.Random, weights: dict[str, float], count: int) -> list[str]:
    return rng.choices(tuple(weights), tuple(weights.values()), k=count)
