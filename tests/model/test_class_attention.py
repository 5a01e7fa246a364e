"""What the class token attends to, in layers of which nothing else is run."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import CLIPVisionModel

from llava_mini.model.class_attention import class_attention
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from tests.tiny_models import pixels, tiny_model


def whole_tower(model: LlavaMiniForConditionalGeneration, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that transformers can tell of a run of the whole tower: hidden states, attention, keys and queries."""
    tower = model.vision_tower
    tower.set_attn_implementation("eager")
    found: dict[str, torch.Tensor] = {}

    def keep(name: str):
        return lambda _module, _inputs, output: found.__setitem__(name, output)

    hooks = [
        getattr(layer.self_attn, f"{kind}_proj").register_forward_hook(keep(f"{kind}{index}"))
        for index, layer in enumerate(tower.encoder.layers)
        for kind in "qk"
    ]
    output = tower(images, output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(tower.encoder.layers):
        found[f"in{index}"] = output.hidden_states[index]
        found[f"attention{index}"] = output.attentions[index]
        assert layer is not None
    return found


@pytest.fixture(scope="module")
def model() -> LlavaMiniForConditionalGeneration:
    return tiny_model()


@pytest.mark.parametrize("index", [1, 2])
@torch.inference_mode()
def test_it_is_what_the_whole_layer_computes(model, index):
    whole = whole_tower(model, pixels(model.config, 2)[:, 0])
    layer = model.vision_tower.encoder.layers[index]
    keys, attention = class_attention(layer, whole[f"in{index}"], num_heads=2)
    torch.testing.assert_close(keys, whole[f"k{index}"][:, 1:])
    torch.testing.assert_close(attention, whole[f"attention{index}"][:, :, 0, 1:])


@torch.inference_mode()
def test_one_head_takes_the_whole_width(model):
    whole = whole_tower(model, pixels(model.config, 2)[:, 0])
    _, attention = class_attention(model.vision_tower.encoder.layers[2], whole["in2"], num_heads=1)
    scores = whole["q2"] @ whole["k2"].transpose(1, 2) / whole["q2"].shape[-1] ** 0.5
    torch.testing.assert_close(attention[:, 0], scores.softmax(-1)[:, 0, 1:])


@torch.no_grad()
def test_a_layer_that_is_spread_over_processes_is_put_together_and_spread_again():
    tower = CLIPVisionModel(tiny_model().config.vision)
    layer, hidden = tower.encoder.layers[-1], torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(0))
    expected = class_attention(layer, hidden, num_heads=2)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(tower, mesh=init_device_mesh("cpu", (1,)))
        weight = layer.self_attn.k_proj.weight
        found = class_attention(layer, hidden, num_heads=2)
        assert type(layer.self_attn.k_proj.weight) is type(weight)
        assert type(weight).__name__ == "DTensor"
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
