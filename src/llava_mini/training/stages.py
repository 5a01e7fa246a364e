"""What trains, at which rate: a list of rules that together name every parameter exactly once.

The paper has two stages (section 4.3): the projector alone on captions, then everything but the
vision encoder on instructions. Our recipes have more; each is one ``Stage``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the parameters of one part of a model."""

    part: str
    """Regular expression that the beginning of a parameter's name matches: ``projector\\.``."""
    rate: float
    """Peak learning rate. 0 keeps the part frozen."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"The learning rate of part {self.part!r} must be 0 (frozen) or more, got {self.rate}.")

    def matches(self, name: str) -> bool:
        """Return whether the rule decides over the parameter called ``name``."""
        return re.match(self.part, name) is not None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A named list of rules."""

    name: str
    rules: tuple[Rule, ...]

    def rate_of(self, name: str) -> float:
        """Return the peak learning rate of a parameter, 0 when it is frozen.

        Raises:
            ValueError: If no rule matches the name, or more than one does.
        """
        matching = [rule for rule in self.rules if rule.matches(name)]
        if len(matching) != 1:
            found = ", ".join(repr(rule.part) for rule in matching) or "none"
            raise ValueError(
                f"Parameter {name!r} must be matched by exactly one rule of stage {self.name!r}, but {found} matched. "
                f"The rules are {', '.join(repr(rule.part) for rule in self.rules)}: add or narrow one."
            )
        return matching[0].rate


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a peak learning rate."""

    rate: float
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]


def apply_stage(named_parameters: Iterable[tuple[str, nn.Parameter]], stage: Stage) -> list[ParameterGroup]:
    """Freeze and unfreeze parameters as a stage says, and return those that train, by rate.

    Args:
        named_parameters: All parameters, as ``model.named_parameters()`` gives them.
        stage: The rules.

    Raises:
        ValueError: If a parameter is not matched by exactly one rule, or a rule matches nothing.
    """
    by_rate: dict[float, list[tuple[str, nn.Parameter]]] = {}
    unused = {rule.part for rule in stage.rules}
    for name, parameter in named_parameters:
        rate = stage.rate_of(name)
        unused -= {rule.part for rule in stage.rules if rule.matches(name)}
        parameter.requires_grad_(rate > 0)
        if rate > 0:
            by_rate.setdefault(rate, []).append((name, parameter))
    if unused:
        raise ValueError(
            f"Rules of stage {stage.name!r} match no parameter: {', '.join(sorted(unused))}. "
            "Is a part misspelt, or absent from this model?"
        )
    return [
        ParameterGroup(rate=rate, names=tuple(name for name, _ in pairs), parameters=tuple(p for _, p in pairs))
        for rate, pairs in by_rate.items()
    ]
