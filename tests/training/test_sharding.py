import pytest
import torch
from torch import nn
from torch.nn import functional

from llava_mini.flow import ModelInputs
from llava_mini.training.idle_frames import with_idle_frame
from llava_mini.training.sharding import EngineSettings, layers_of, prepare
from llava_mini.training.stages import Rule, Stage
from llava_mini.training.world import World
from tests.tiny_models import tiny_model
from tests.training.tuning import STAGE, Tuning

ALL = Stage(name="all", rules=(Rule(part="", rate=1e-3),))


def test_layers_are_spread_as_units_of_their_own_and_whole_models_never():
    model = tiny_model()
    names = {module: name for name, module in model.named_modules()}
    found = {names[layer] for layer in layers_of(model)}
    assert found == {
        *(f"vision_tower.encoder.layers.{index}" for index in range(3)),
        *(f"language_model.model.layers.{index}" for index in range(3)),
        *(f"prefusion.layers.{index}" for index in range(2)),
        "vision_tower.embeddings",
        "projector",
        "reducer",
    }


def test_layers_of_a_model_within_another_module_are_found_too():
    assert len(layers_of(nn.ModuleDict({"model": tiny_model()}))) == 11


def test_an_unknown_strategy_or_kernel_is_refused():
    with pytest.raises(ValueError, match="strategy is 'fast'; choose one of none, ddp, fsdp"):
        EngineSettings(strategy="fast")
    with pytest.raises(ValueError, match="attention is 'fast'; choose one of sdpa, eager, flash_attention_2"):
        EngineSettings(attention="fast")


def test_recomputing_runs_the_layers_that_train_twice_and_frozen_vision_once():
    task = Tuning(spread=False)
    forward = prepare(task, STAGE, EngineSettings(checkpoint_activations=True), World())
    task.module.train()
    counts = {"prefusion": 0, "language": 0, "vision": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    task.module.prefusion.layers[0].block.mlp.register_forward_pre_hook(count("prefusion"))
    task.module.language_model.model.layers[0].mlp.register_forward_pre_hook(count("language"))
    task.module.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(count("vision"))
    total = forward(task.make_batch(0))
    before = dict(counts)
    total.backward()
    assert before["language"] == before["vision"] == 1
    assert counts == {"prefusion": 2 * before["prefusion"], "language": 2, "vision": 1}


def test_a_module_that_cannot_recompute_is_refused():
    class Line:
        module = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="needs a transformers model that can recompute its layers"):
        prepare(Line(), ALL, EngineSettings(checkpoint_activations=True), World())


@pytest.mark.parametrize("recomputed", [False, True])
def test_layers_are_compiled_one_by_one_and_compute_the_same(monkeypatch, recomputed):
    compiled = []

    def trace(layer):  # without a C++ compiler, which takes a minute
        compiled.append(layer)
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", trace)
    small = {"text": {"num_hidden_layers": 1}, "prefusion_num_layers": 1}
    plain, task = Tuning(spread=False, model=small), Tuning(spread=False, model=small)
    settings = EngineSettings(compile_layers=True, checkpoint_activations=recomputed)
    forward = prepare(task, STAGE, settings, World())
    task.module.train()
    assert compiled == layers_of(task.module)
    expected = plain.losses(plain.make_batch(0)).total
    total = forward(task.make_batch(0))
    total.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def gradients(model, inputs):
    model.zero_grad()
    fused = model.fuse(inputs)
    hidden = model.language_model.model(inputs_embeds=fused.inputs_embeds, attention_mask=fused.attention_mask)[0]
    targets = fused.labels[:, 1:]
    loss = functional.cross_entropy(model.language_model.lm_head(hidden[:, :-1]).flatten(0, 1), targets.flatten())
    loss.backward()
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_an_idle_frame_reaches_every_part_and_teaches_nothing():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 3]])
    text = ModelInputs(
        input_ids=ids,
        attention_mask=(ids != 3).long(),
        labels=torch.where(ids > 6, ids, -100).masked_fill(ids == 3, -100),
    )
    loss, expected = gradients(model, text)
    idle_loss, found = gradients(model, with_idle_frame(text, model.config, torch.device("cpu")))
    assert idle_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in found.items():
        if name.startswith(("projector.", "reducer.", "prefusion.")):
            assert expected[name] is None
            assert gradient is not None, name
            assert not gradient.any(), name
        elif expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name])


def test_inputs_with_frames_stay_as_they_are_and_nothing_becomes_one_silent_prompt():
    model = tiny_model()
    inputs = ModelInputs(input_ids=torch.tensor([[64, 5]]), pixel_values=torch.zeros(1, 1, 3, 8, 8))
    assert with_idle_frame(inputs, model.config, torch.device("cpu")) is inputs
    alone = with_idle_frame(None, model.config, torch.device("cpu"))
    assert (alone.labels == -100).all()
    assert model.fuse(alone).num_frames == (1,)
