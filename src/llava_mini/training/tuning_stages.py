"""What trains in the two stages of the paper, at which rate (section 4.3 and Table 9).

The rules name every parameter of a ``LlavaMiniForConditionalGeneration`` exactly once, low-rank updates included. The
vision tower is frozen in both stages, and so are the position codes of the queries, which are sines and cosines.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from llava_mini.training.stages import Rule, Stage

PARTS = ("vision_tower", "projector", "reducer", "prefusion", "language_model")
"""Of the model, in the order in which data travels."""

CODES = r"reducer\.query_codes"
LOW_RANK = r"[\w.]+\.lora_[AB]\."
"""What follows a part in the name of a low-rank update."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rates; 0 keeps a part frozen. The defaults are those of stage 2."""

    projector: float = 1e-5
    reducer: float = 1e-5
    prefusion: float = 1e-5
    """Layers that start from random weights may want more: 1e-4 is worth a try."""
    language_model: float = 1e-4
    """Its embeddings train too, which the released code detaches."""
    low_rank: float = 2e-4
    """Of low-rank updates, where there are any; the matrices that they are added to stay frozen."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"The learning rate of {field.name} is {getattr(self, field.name)}; it must be 0 (frozen) or more."
                )


STAGE_1 = Rates(projector=1e-3, reducer=0.0, prefusion=0.0, language_model=0.0)
"""The projector alone."""
STAGE_2 = Rates()
"""Everything but the vision tower."""


def tuning_stage(name: str, parameters: Iterable[str], rates: Rates) -> Stage:
    """Return the rules of a stage for a model with these parameters.

    A part that the model does not have gets no rule. Where a part has low-rank updates, they alone train.

    Args:
        name: Of the stage.
        parameters: Names of all parameters of the model, as ``named_parameters()`` gives them.
        rates: Of the parts.
    """
    names = list(parameters)
    rules: list[Rule] = []
    for part in PARTS:
        own = [one for one in names if one.startswith(f"{part}.")]
        if not own:
            continue
        rate = 0.0 if part == "vision_tower" else getattr(rates, part)
        beginning = f"{part}\\."
        if any(".lora_" in one for one in own):
            rules += [
                Rule(part=f"{beginning}{LOW_RANK}", rate=rates.low_rank),
                Rule(part=f"{beginning}(?!{LOW_RANK})", rate=0.0),
            ]
        elif part == "reducer" and any(one.startswith("reducer.query_codes") for one in own):
            rules += [Rule(part=CODES, rate=0.0), Rule(part=f"(?!{CODES}){beginning}", rate=rate)]
        else:
            rules.append(Rule(part=beginning, rate=rate))
    return Stage(name=name, rules=tuple(rules))
