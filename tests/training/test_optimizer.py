import math

import pytest
import torch
from torch import nn

from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings, rate_share
from llava_mini.training.stages import Rule, Stage, apply_stage

SETTINGS = OptimizerSettings()


def optimizer_of(module, rate=1e-2):
    stage = Stage(name="all", rules=(Rule(part="", rate=rate),))
    return MasterAdamW(apply_stage(module.named_parameters(), stage), SETTINGS)


def test_float32_weights_move_as_with_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(ours)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.05}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.98),
    )
    x = torch.randn(8, 4)
    for _ in range(5):
        ours(x).square().mean().backward()
        optimizer.step(1.0)
        theirs(x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_steps_too_small_for_bfloat16_add_up_in_the_master_copy():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = optimizer_of(module, rate=1e-4)
    for _ in range(100):
        (module.weight.sum() * 1.0).backward()
        optimizer.step(1.0)
    assert float(module.weight.detach()) < 1.0
    assert float(optimizer.masters[0]) == pytest.approx(0.99, abs=1e-3)


def test_the_length_of_the_gradients_is_returned_and_gradients_are_cleared():
    module = nn.Linear(2, 1, bias=False)
    optimizer = optimizer_of(module)
    (module.weight * torch.tensor([[3.0, 4.0]])).sum().backward()
    assert optimizer.step(1.0) == pytest.approx(5.0)
    assert module.weight.grad is None


def test_all_frozen_is_refused():
    with pytest.raises(ValueError, match="No parameter"):
        MasterAdamW([], SETTINGS)


def test_the_rate_rises_then_falls_to_its_last_share():
    shares = [rate_share(step, 100, SETTINGS) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 3)
    assert max(shares) == shares[2] == 1.0
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert shares[-1] == pytest.approx(0.02)


def test_gradients_of_micro_batches_add_up_in_float32():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = optimizer_of(module)
    for part in (1.0, 2**-9):
        (module.weight.sum() * part).backward()
        optimizer.collect()
        assert module.weight.grad is None
    assert optimizer.step(1.0) == pytest.approx(1 + 2**-9, rel=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing():
    module = nn.Linear(2, 1, bias=False)
    before = module.weight.detach().clone()
    optimizer = optimizer_of(module)
    (module.weight * torch.tensor([[1.0, float("inf")]])).sum().backward()
    assert not math.isfinite(optimizer.step(1.0))
    assert torch.equal(module.weight, before)
    assert not optimizer.adam.state


def test_float32_weights_are_not_kept_twice():
    module = nn.Linear(2, 1, bias=False)
    [master] = optimizer_of(module).masters
    assert master.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_and_moments_that_were_read_into_go_on_as_before(dtype):
    torch.manual_seed(0)
    first, second = (nn.Linear(4, 3).to(dtype) for _ in range(2))
    x = torch.randn(8, 4, dtype=dtype)
    one, two = optimizer_of(first), optimizer_of(second)
    first(x).square().mean().backward()
    one.step(1.0)
    for ours, theirs in zip(two.masters, one.masters, strict=True):
        ours.copy_(theirs)
    for name, moment in two.moments().items():
        moment.copy_(one.moments()[name])
    two.go_on(1)
    for module, optimizer in ((first, one), (second, two)):
        module(x).square().mean().backward()
        optimizer.step(0.5)
    assert torch.equal(first.weight, second.weight)
