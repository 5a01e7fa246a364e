import pytest
from torch import nn

from llava_mini.training.stages import Rule, Stage, apply_stage


def model():
    return nn.ModuleDict({"projector": nn.Linear(2, 3), "tower": nn.Linear(3, 2)})


def test_rules_freeze_unfreeze_and_group_by_rate():
    module = model()
    stage = Stage(name="one", rules=(Rule(part=r"projector\.", rate=0.1), Rule(part=r"tower\.", rate=0)))
    groups = apply_stage(module.named_parameters(), stage)
    assert [(group.rate, group.names) for group in groups] == [(0.1, ("projector.weight", "projector.bias"))]
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, True, False, False]


def test_a_parameter_without_a_rule_is_named():
    stage = Stage(name="one", rules=(Rule(part=r"projector\.", rate=0.1),))
    with pytest.raises(
        ValueError, match=r"'tower.weight' must be matched by exactly one rule of stage 'one', but none"
    ):
        apply_stage(model().named_parameters(), stage)


def test_a_parameter_with_two_rules_is_named():
    stage = Stage(name="one", rules=(Rule(part="", rate=0.1), Rule(part=r"tower\.", rate=0)))
    with pytest.raises(ValueError, match=r"'tower.weight' must be matched by exactly one rule"):
        apply_stage(model().named_parameters(), stage)


def test_a_rule_without_a_parameter_is_named():
    stage = Stage(name="one", rules=(Rule(part="", rate=0.1), Rule(part=r"reducer\.", rate=0)))
    with pytest.raises(ValueError, match=r"match no parameter: reducer"):
        apply_stage(model().named_parameters(), stage)


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match="0 \\(frozen\\) or more, got -1"):
        Rule(part="", rate=-1)
