"""A step of training is the same in all orders of work: equal losses, equal gradients."""

import json
from dataclasses import replace

import pytest
import torch

from llava_mini.benchmarks import train
from llava_mini.benchmarks.film_ways import without_reduction
from llava_mini.benchmarks.run import read_report
from llava_mini.benchmarks.sizes import random_model, size_config
from llava_mini.benchmarks.train import Settings
from llava_mini.benchmarks.train_ways import ORDERS, SampleText, make_batch, make_loss, recompute

CPU = torch.device("cpu")
SETTINGS = Settings(
    size="tiny", samples=2, text_tokens=5, answer_tokens=3, repeats=1, warmup=0, device="cpu", dtype="float32"
)


@pytest.fixture(scope="module")
def model():
    return random_model(size_config("tiny"), CPU, torch.float32).requires_grad_(True).train()


def step(model, inputs, order, *, again):
    recompute(model, order, again)
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad_(False)
    loss = make_loss(order, model, inputs)()
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_all_orders_give_the_same_loss_and_gradients(model, stage, again):
    trained = without_reduction(model) if stage == 1 else model
    text = SampleText(asked=0, answered=4) if stage == 1 else SampleText(asked=6, answered=4)
    inputs = make_batch(trained, 3, text)
    found = {order: step(trained, inputs, order, again=again) for order in ORDERS}
    loss, gradients = found["released"]
    assert any(name.startswith("projector") for name in gradients)
    assert any(name.startswith("prefusion") for name in gradients) == (stage == 2)
    for order in ORDERS[1:]:
        torch.testing.assert_close(found[order][0], loss)
        assert found[order][1].keys() == gradients.keys()
        for name, gradient in found[order][1].items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5, msg=f"{order}: {name}")


def test_only_the_order_here_computes_pre_fusion_again(model):
    flags = {}
    for order in ORDERS:
        recompute(model, order, True)
        flags[order] = [layer.gradient_checkpointing for layer in model.prefusion.layers]
        assert model.language_model.is_gradient_checkpointing
    recompute(model, "here", False)
    assert not model.language_model.is_gradient_checkpointing
    assert {order: {*of_layers} for order, of_layers in flags.items()} == {
        "released": {False},
        "here": {True},
        "here, kept features": {True},
    }


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "peak_in_process", lambda bench, request: train.peak_here(json.loads(json.dumps(request))))
        return train.run(SETTINGS)


def test_every_order_is_measured_in_both_stages(report):
    ways = report.results["ways"]
    assert len(ways) == 2 * 2 * len(ORDERS)
    for one in ways:
        assert len(one["seconds"]) == 1
        assert one["seconds"][0] > 0
        assert one["peak"]["host"] >= 0
    for stage in (1, 2):
        losses = torch.tensor([one["loss"][0] for one in ways if one["stage"] == stage])
        torch.testing.assert_close(losses, losses[:1].expand_as(losses))
    assert str(read_report(report.line())) == str(report)


def test_the_peak_of_a_process_is_that_of_one_order():
    request = {"settings": vars(SETTINGS), "way": (2, "yes", "here")}
    assert train.peak_here(request)["host"] >= 0


def test_weights_are_updated_when_that_is_asked_for():
    trained = train._Trained(2, replace(SETTINGS, update=True), CPU)
    before = trained.step(trained.loss_of("here"), "here", again=False)["loss"]
    for _ in range(3):
        after = trained.step(trained.loss_of("released"), "released", again=False)["loss"]
    assert after < before


def test_low_rank_updates_alone_train_in_the_language_model():
    pytest.importorskip("peft")
    trained = train._Trained(2, replace(SETTINGS, low_rank=2), CPU)
    names = [name for name, one in trained.model.named_parameters() if one.requires_grad]
    of_language = [name for name in names if name.startswith("language_model")]
    assert of_language
    assert all(".lora_" in name for name in of_language)
    assert any(name.startswith("prefusion") for name in names)
    assert trained.step(trained.loss_of("here"), "here", again=True)["loss"] > 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stages": (3,)}, r"stages are one or both of 1 and 2.*\[3\]"),
        ({"stages": ()}, "one or both"),
        ({"recompute": ("no", "no")}, "each once"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"size": "huge"}, "There is no size 'huge'"),
    ],
)
def test_wrong_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Settings(**given)
