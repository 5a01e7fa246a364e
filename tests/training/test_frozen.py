import pytest
import torch
from torch import nn

from llava_mini.training.frozen import frozen_digests


def parts(**fields):
    torch.manual_seed(0)
    return nn.ModuleDict({"eye": nn.Linear(3, 4, **fields), "ear": nn.Linear(2, 2, **fields)})


def test_digests_are_equal_for_equal_weights_and_have_a_part_each():
    assert frozen_digests(parts(), ()) == frozen_digests(parts(), ())
    assert set(frozen_digests(parts(), ())) == {"eye", "ear"}
    assert set(frozen_digests(parts(), {"module.ear.weight", "module.ear.bias"})) == {"eye"}
    assert frozen_digests(parts(), {"module.ear.weight"})["ear"] != frozen_digests(parts(), ())["ear"]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_digest_of_a_part_follows_each_of_its_weights(name):
    before, other = frozen_digests(parts(), ()), parts()
    with torch.no_grad():
        other["eye"].get_parameter(name).view(-1)[-1] += 1e-6
    assert frozen_digests(other, ())["eye"] != before["eye"]
    assert frozen_digests(other, ())["ear"] == before["ear"]
    assert frozen_digests(other, {f"module.eye.{name}"}) == frozen_digests(parts(), {f"module.eye.{name}"})


def test_the_same_numbers_in_another_format_or_shape_are_others():
    zeros = parts()
    with torch.no_grad():
        zeros["eye"].weight.zero_()
    before = frozen_digests(zeros, ())
    zeros["eye"].weight = nn.Parameter(torch.zeros(3, 4))
    assert frozen_digests(zeros, ())["eye"] != before["eye"]
    assert frozen_digests(parts(dtype=torch.bfloat16), ()) != frozen_digests(parts(), ())


def test_scalars_empty_tensors_and_views_have_digests():
    odd = nn.Module()
    base = torch.arange(6.0).view(2, 3)
    odd.one = nn.ParameterList([torch.tensor(1.0), torch.zeros(0), base.T])
    same = nn.Module()
    same.one = nn.ParameterList([torch.tensor(1.0), torch.zeros(0), base.T.contiguous()])
    assert frozen_digests(odd, ()) == frozen_digests(same, ())
