"""Records of the drawn world, one for each index of a split."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from llava_mini.data.records import Noun, Record, Turn
from llava_mini.data.synthetic.clip_questions import ask_about_clip
from llava_mini.data.synthetic.clips import random_clip
from llava_mini.data.synthetic.drawing import draw_scene
from llava_mini.data.synthetic.questions import ask, describe, noun_of
from llava_mini.data.synthetic.scenes import CANVAS, Scene, SceneSettings, random_scene
from llava_mini.data.synthetic.splits import Split, generator_of

IMAGE_KINDS = {
    "existence": 1.0,
    "colour": 1.0,
    "shape": 1.0,
    "size": 1.0,
    "count": 1.0,
    "attribute count": 1.0,
    "location": 1.0,
    "relation": 1.2,
    "compare": 1.2,
    "text": 1.5,
    "chart": 1.0,
    "absence": 0.5,
    "cannot tell": 0.3,
    "caption": 0.3,
}
"""How often each kind of question about an image is asked, relative to the others that its scene allows."""

CLIP_KINDS = {
    "direction": 1.0,
    "moving": 1.0,
    "order": 1.5,
    "change": 1.0,
    "event count": 1.0,
    "clip place": 1.0,
    "clip colour": 0.5,
    "clip absence": 0.4,
    "clip caption": 0.2,
}
"""How often each kind of question about a clip is asked, relative to the others that it allows."""


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """What records of the world hold."""

    scene: SceneSettings = field(default_factory=lambda: SceneSettings(chart_share=0.1))
    image_kinds: dict[str, float] = field(default_factory=lambda: dict(IMAGE_KINDS))
    clip_kinds: dict[str, float] = field(default_factory=lambda: dict(CLIP_KINDS))
    clip_share: float = 0.0
    """Share of records that are about a clip."""
    min_turns: int = 1
    max_turns: int = 1
    """Questions about the same picture; fewer where it does not allow so many different ones."""
    side: int = CANVAS
    """Pixels per side of a picture."""


@dataclass(frozen=True, kw_only=True)
class WorldItem:
    """What a record is made of, before anything is drawn."""

    frames: tuple[Scene, ...]
    """One scene for an image, several for a clip."""
    description: str
    """Everything that is to be seen, in words."""
    turns: tuple[Turn, ...]
    things: tuple[Noun, ...]
    """Things with a name of their own, with their places."""
    side: int = CANVAS
    """Pixels per side of a picture."""

    def record(self) -> Record:
        """Draw the frames."""
        pictures = tuple(draw_scene(scene, self.side) for scene in self.frames)
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
    for attempt in range(1000):
        rng = generator_of(split, index, f"{stream}{attempt}")
        num_turns = rng.randint(settings.min_turns, settings.max_turns)
        if rng.random() < settings.clip_share:
            clip = random_clip(rng)
            frames, description, things = clip.frames, clip.describe(), clip.nouns()
            kinds, maker = settings.clip_kinds, partial(ask_about_clip, rng, clip, split=split)
        else:
            scene = random_scene(rng, settings.scene)
            frames, description = (scene,), describe(scene)
            things = tuple(noun_of(thing.name, thing) for thing in scene.unique_things)
            kinds, maker = settings.image_kinds, partial(ask, rng, scene, split=split)
        turns = _turns(rng, kinds, num_turns, maker)
        if turns:
            return WorldItem(frames=frames, description=description, turns=turns, things=things, side=settings.side)
    raise ValueError(f"No picture in 1000 allows a question of the kinds {settings.image_kinds | settings.clip_kinds}.")


def world_record(split: Split, index: int, settings: WorldSettings, stream: str = "record") -> Record:
    """Return the item at an index, drawn. The arguments are those of ``world_item``."""
    return world_item(split, index, settings, stream).record()


def _turns(
    rng: random.Random, weights: dict[str, float], count: int, maker: Callable[..., Turn | None]
) -> tuple[Turn, ...]:
    """Return up to ``count`` different questions, of kinds drawn by their weights among those that can be asked."""
    left = {kind: weight for kind, weight in weights.items() if weight > 0}
    turns: dict[str, Turn] = {}
    for _ in range(2 * count):
        if len(turns) == count or not left:
            break
        kind = rng.choices(tuple(left), tuple(left.values()))[0]
        turn = maker(kind=kind)
        if turn is None:
            del left[kind]
        else:
            turns.setdefault(turn.question, turn)
    return tuple(turns.values())
