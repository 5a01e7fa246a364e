"""What changes from one frame of a clip to the next: what comes, what goes, and what moves which way."""

from collections.abc import Sequence

from llava_mini.data.records import Noun

FACTS = ("colour", "shape", "size")
"""Properties of things that are known in a drawn world."""
IGNORED = -100
"""The value of what is not to be learned."""
CHANGES = {
    **{f"{role} {fact}": fact for role in ("comes", "goes", "moves") for fact in ("colour", "shape")},
    "direction": "direction",
}
"""What there is to tell of a frame, and which property each is."""
DIRECTIONS = 4
"""Left, right, up and down."""

FrameChange = dict[str, int]
"""For each of ``CHANGES``: 0 for none, else 1 and the number of its value; ``IGNORED`` where things differ in it."""

_NEAR = 1e-6


def changes_of(things: Sequence[Noun]) -> list[FrameChange]:
    """Return what changes in each frame of a clip but the first.

    A thing that gets another name, because its colour changes, goes under the one and comes under the other.

    Args:
        things: Every name that a thing of the clip has in some frame, with its properties.
    """
    num_frames = max((len(thing.path) for thing in things), default=0)
    found = []
    for frame in range(1, num_frames):
        steps = [(thing, thing.path[frame - 1], thing.path[frame]) for thing in things]
        moved = {
            index: _direction(before, after)
            for index, (_, before, after) in enumerate(steps)
            if before is not None and after is not None and max(_step(before, after)) > _NEAR
        }
        roles = {
            "comes": [thing for thing, before, after in steps if before is None and after is not None],
            "goes": [thing for thing, before, after in steps if before is not None and after is None],
            "moves": [things[index] for index in moved],
        }
        change = {
            f"{role} {fact}": _common([dict(thing.facts).get(fact) for thing in those])
            for role, those in roles.items()
            for fact in ("colour", "shape")
        }
        found.append({**change, "direction": _common(list(moved.values()))})
    return found


def _common(values: Sequence[int | None]) -> int:
    if not values:
        return 0
    value = values[0]
    return IGNORED if value is None or any(other != value for other in values) else 1 + value


def _step(before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
    return abs(after[0] - before[0]), abs(after[1] - before[1])


def _direction(before: tuple[float, float], after: tuple[float, float]) -> int:
    across, down = _step(before, after)
    if across > down:
        return 0 if after[0] < before[0] else 1
    return 2 if after[1] < before[1] else 3
