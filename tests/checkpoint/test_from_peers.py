"""MQT-LLaVA and TokenPacker in the layouts of their authors: made-up weights under the published names.

What a converted model gives is compared with plain modules whose attributes have these names.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig

from llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.checkpoint.convert import convert
from llava_mini.model.positions import sine_cosine_2d
from tests.checkpoint.folders import edit_json, stored_tensors, write_tensors
from tests.tiny_models import IMAGE_TOKEN, tiny_model

WIDTH, LANGUAGE, SIDE = 32, 32, 4


class QueryAbstractor(nn.Module):
    """The tensors of MQT-LLaVA's ``query_abstractor``, and what they compute."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(grid**2, WIDTH))
        self.pos_embed = nn.Parameter(sine_cosine_2d(grid, WIDTH).half(), requires_grad=False)
        self.attn = nn.MultiheadAttention(WIDTH, 16)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(WIDTH, LANGUAGE) / WIDTH**0.5)
        self.grid = grid

    def forward(self, hidden: tuple[Tensor, ...], num_tokens: int) -> Tensor:
        patches = hidden[-2][:, 1:].transpose(0, 1)  # [N, F, E]
        square = self.pos_embed.float().reshape(1, self.grid, self.grid, WIDTH).permute(0, 3, 1, 2)
        codes = functional.interpolate(square, size=(SIDE, SIDE), mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)
        queries = (self.query + self.pos_embed)[:num_tokens, None].expand(-1, patches.shape[1], -1)
        keys = codes.half().float()[:, None].expand(-1, patches.shape[1], -1)
        read, _ = self.attn(self.ln_q(queries), self.ln_k(keys), self.ln_v(patches))
        return read.transpose(0, 1) @ self.proj


class Packer(nn.Module):
    """The tensors of TokenPacker's ``mm_projector``, and what they compute, one region after the other."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.q_proj_1 = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj_1, self.v_proj_1 = (
            nn.Sequential(nn.Linear(4 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
        )
        self.ln_q_1, self.ln_k_1, self.ln_v_1 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(3))
        self.clip_attn = nn.MultiheadAttention(WIDTH, 8)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, LANGUAGE), nn.GELU(), nn.Linear(LANGUAGE, LANGUAGE))
        self.factor = factor

    def forward(self, hidden: tuple[Tensor, ...]) -> Tensor:
        grid, last = SIDE // self.factor, hidden[-2][:, 1:]
        layers = torch.cat([hidden[index][:, 1:] for index in (2, 2, 3, 3)], dim=2)  # 12, 16, 22, 23 of 24
        keys, values = self.ln_k_1(self.k_proj_1(layers)), self.ln_v_1(self.v_proj_1(layers))
        square = last.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        small = functional.interpolate(square, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
        queries, tokens = self.ln_q_1(self.q_proj_1(small)), []
        for number in range(grid**2):
            top, left = (self.factor * place for place in divmod(number, grid))
            inside = [(top + down) * SIDE + left + right for down in range(self.factor) for right in range(self.factor)]
            rows = (queries[:, [number]], keys[:, inside], values[:, inside])
            tokens.append(self.clip_attn(*(one.transpose(0, 1) for one in rows))[0].transpose(0, 1))
        return self.mlp(torch.cat(tokens, dim=1))


@pytest.fixture(scope="module")
def skeleton() -> LlavaMiniForConditionalGeneration:
    """A tower and a language model, those of a small LLaVA-1.5."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=2
    )
    return tiny_model(vision_config=vision, reducer="identity", prefusion_num_layers=0)


def publish(
    skeleton: LlavaMiniForConditionalGeneration, name: str, module: nn.Module, folder: Path, **fields: Any
) -> Path:
    """The folder that the authors of ``module`` would publish."""
    folder.mkdir()
    parts = {
        "model.vision_tower.vision_tower.vision_model.": skeleton.vision_tower.state_dict(),
        "model.": skeleton.language_model.model.state_dict(),
        "lm_head.": skeleton.language_model.lm_head.state_dict(),
        f"model.{name}.": module.state_dict(),
    }
    write_tensors(folder, {f"{prefix}{key}": one for prefix, part in parts.items() for key, one in part.items()})
    text = skeleton.config.text.to_dict()
    config = {
        **{key: value for key, value in text.items() if key not in {"model_type", "rope_parameters", "architectures"}},
        "rope_theta": 10000.0,
        "model_type": "llava_llama",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": WIDTH,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip",
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder.parent / "clip").mkdir(exist_ok=True)
    (folder.parent / "clip" / "config.json").write_text(json.dumps(skeleton.config.vision.to_dict()))
    return folder


@torch.no_grad()
def expected(skeleton: LlavaMiniForConditionalGeneration, pictures: Tensor, *arguments: Any) -> Tensor:
    """Logits of a plain model for one picture after a word and before two. arguments: the module, and its own."""
    module, *own = arguments
    hidden = skeleton.vision_tower(pictures, output_hidden_states=True).hidden_states
    tokens = module(hidden, *own)
    words = skeleton.get_input_embeddings()(torch.tensor([[5, 7, 9]]).expand(len(pictures), -1))
    rows = torch.cat([words[:, :1], tokens, words[:, 1:]], dim=1)
    return skeleton.language_model(inputs_embeds=rows).logits


@torch.no_grad()
def found(folder: Path, pictures: Tensor, **fields: Any) -> Tensor:
    model = LlavaMiniForConditionalGeneration.from_pretrained(folder, **fields).eval()
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * model.config.tokens_per_frame, 7, 9]]).expand(len(pictures), -1)
    return model(input_ids=ids, pixel_values=pictures[:, None]).logits


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("told", ["second_stage", 256, None])
def test_mqt_computes_what_the_published_names_compute_at_every_number_of_tokens(tmp_path, skeleton, told):
    torch.manual_seed(0)
    module = QueryAbstractor(2).eval()
    fields = {"query_abstractor_type": "matry_query", "mm_projector_type": "linear"}
    if told is not None:
        fields["num_visual_tokens"] = 4 if told == 256 else told
    publish(skeleton, "query_abstractor", module, tmp_path / "mqt", **fields)
    convert(tmp_path / "mqt", tmp_path / "ours")
    for num_tokens in (1, 3, 4):
        torch.testing.assert_close(
            found(tmp_path / "ours", pictures(), reducer_tokens=num_tokens),
            expected(skeleton, pictures(), module, num_tokens),
            atol=5e-4,  # the published codes have 16 bits, and so has what is made of them
            rtol=1e-4,
        )
    config = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert (config.reducer, config.reducer_tokens, config.prefusion_num_layers) == ("mqt", 4, 0)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_token_packer_computes_what_the_published_names_compute(tmp_path, skeleton, factor):
    torch.manual_seed(0)
    module = Packer(factor).eval()
    fields = {"mm_projector_type": "tokenpacker", "scale_factor": factor}
    publish(skeleton, "mm_projector", module, tmp_path / "packer", **fields)
    convert(tmp_path / "packer", tmp_path / "ours")
    torch.testing.assert_close(
        found(tmp_path / "ours", pictures()), expected(skeleton, pictures(), module), atol=2e-5, rtol=1e-4
    )
    config = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert (config.reducer, config.reducer_grid, config.prefusion_num_layers) == ("token_packer", SIDE // factor, 0)


def test_every_published_tensor_finds_its_place(tmp_path, skeleton):
    for name, module, fields in (
        ("query_abstractor", QueryAbstractor(2), {"query_abstractor_type": "matry_query"}),
        ("mm_projector", Packer(2), {"mm_projector_type": "tokenpacker", "scale_factor": 2}),
    ):
        publish(skeleton, name, module, tmp_path / name, **fields)
        convert(tmp_path / name, tmp_path / f"{name} here")
        assert len(stored_tensors(tmp_path / f"{name} here")) == len(stored_tensors(tmp_path / name))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_aspect_ratio": "slice"}, "slices.*one view"),
        ({"scale_factor": 3}, "scale_factor=3.*4 patches per side"),
        ({"scale_factor": "2"}, "scale_factor='2'"),
        ({"mm_projector_type": "mlp2x_gelu"}, "does not fit its configuration"),
    ],
)
def test_a_token_packer_that_is_not_of_one_view_or_does_not_fit_is_refused(tmp_path, skeleton, changed, told):
    fields = {"mm_projector_type": "tokenpacker", "scale_factor": 2}
    publish(skeleton, "mm_projector", Packer(2), tmp_path / "packer", **fields)
    edit_json(tmp_path / "packer" / "config.json", **changed)
    with pytest.raises(ValueError, match=told):
        convert(tmp_path / "packer", tmp_path / "ours")


def test_more_tokens_than_mqt_has_queries_are_refused(tmp_path, skeleton):
    fields = {"query_abstractor_type": "matry_query", "num_visual_tokens": 5}
    publish(skeleton, "query_abstractor", QueryAbstractor(2), tmp_path / "mqt", **fields)
    with pytest.raises(ValueError, match="at most 4 tokens .* reducer_tokens is 5"):
        convert(tmp_path / "mqt", tmp_path / "ours")
