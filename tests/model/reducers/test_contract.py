"""What every reducer owes the rest of the model. A new method adds a line to ``METHODS`` and passes all of this."""

from typing import Any

import pytest
import torch

from llava_mini.flow import FrameChunk, FusedPrompt, ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.reducer_settings import REDUCER_SETTINGS
from llava_mini.training.shared_frames import fuse_shared
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, prompt, tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "identity": {"reducer": "identity"},
    "average_pool": {"reducer": "average_pool", "reducer_grid": 2},
    "query": {"reducer": "query"},
    "mqt": {"reducer": "mqt", "reducer_tokens": 3, "prefusion_num_layers": 0},
    "m3": {"reducer": "m3", "reducer_grid": 2, "prefusion_num_layers": 0},
    "token_packer": {"reducer": "token_packer", "reducer_grid": 2},
    "quecc": {"reducer": "quecc", "reducer_grid": 2, "prefusion_num_layers": 0},
    "llama_vid": {"reducer": "llama_vid", "prefusion_num_layers": 0},
    "prumerge": {"reducer": "prumerge", "prefusion_num_layers": 0},
    "prumerge_plus": {"reducer": "prumerge_plus", "prefusion_num_layers": 0},
    "visionzip": {"reducer": "visionzip", "reducer_tokens": 7},
    "divprune": {"reducer": "divprune", "reducer_tokens": 5},
    "fastv": {"reducer": "fastv", "prefusion_num_layers": 0, "reducer_tokens": 5},
    "voco": {"reducer": "voco", "prefusion_num_layers": 0, "reducer_tokens": 2},
    "query_inside": {"reducer": "query_inside", "prefusion_num_layers": 0, "reducer_grid": 2},
}
"""One model for each reducer, by that name."""

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def test_every_reducer_is_in_the_contract():
    assert set(METHODS) == set(REDUCER_SETTINGS)
    assert all(fields["reducer"] == name for name, fields in METHODS.items())


@pytest.fixture(params=list(METHODS))
def model(request: pytest.FixtureRequest) -> LlavaMiniForConditionalGeneration:
    return tiny_model(**METHODS[request.param])


def mixed(model: LlavaMiniForConditionalGeneration, side: str) -> tuple[list[list[int]], list[int], ModelInputs]:
    """Prompts about an image, two images, a film and nothing, their numbers of frames, and all of it in one batch."""
    config = model.config
    rows = [
        prompt(config, [5, 6], 1, [7, 8, 9]),
        prompt(config, [5], 1, [4], 1, [9, 10, 11, 12]),
        prompt(config, [6], 3, [13]),
        [5, 6, 7, 8],
    ]
    return rows, [1, 2, 3, 0], ModelInputs(**batch(rows, side), pixel_values=pixels(config, 6))


def alone(rows: list[list[int]], frames: list[int], together: ModelInputs) -> list[ModelInputs]:
    """The prompts of a batch one by one."""
    assert isinstance(together.pixel_values, torch.Tensor)
    parts = together.pixel_values.split(frames)
    return [
        ModelInputs(input_ids=torch.tensor([row]), pixel_values=part if len(part) else None)
        for row, part in zip(rows, parts, strict=True)
    ]


def rows_of(prompt: FusedPrompt, row: int) -> torch.Tensor:
    return prompt.inputs_embeds[row][prompt.attention_mask[row].bool()]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_batch_fuses_as_its_prompts_do_alone(model: LlavaMiniForConditionalGeneration, side: str):
    rows, frames, inputs = mixed(model, side)
    together = model.fuse(inputs)
    for row, one in enumerate(alone(rows, frames, inputs)):
        close(rows_of(together, row), model.fuse(one).inputs_embeds[0])


@torch.inference_mode()
def test_a_batch_generates_what_its_prompts_do_alone(model: LlavaMiniForConditionalGeneration):
    rows, frames, inputs = mixed(model, "left")
    fused = model.fuse(inputs)
    output = model.generate(fused=fused, **GREEDY)
    assert isinstance(output, torch.Tensor)
    for row, one in enumerate(alone(rows, frames, inputs)):
        single = model.generate(fused=model.fuse(one), **GREEDY)
        assert isinstance(single, torch.Tensor)
        assert torch.equal(output[row, -5:], single[0, -5:])


@torch.inference_mode()
def test_streamed_frames_fuse_as_frames_at_once(model: LlavaMiniForConditionalGeneration):
    film = pixels(model.config, 5)
    questions = [[7, 8, 9], [10]]
    whole = [
        model.fuse(ModelInputs(input_ids=torch.tensor([prompt(model.config, [5, 6], 5, question)]), pixel_values=film))
        for question in questions
    ]
    places = batch([[5, 6, IMAGE_TOKEN, *question] for question in questions], "right")
    chunks = [FrameChunk(pixel_values=part, slot=0) for part in film.split(2)]
    streamed = model.fuse(ModelInputs(**places, pixel_values=chunks))
    for row, one in enumerate(whole):
        close(rows_of(streamed, row), one.inputs_embeds[0])


@torch.inference_mode()
def test_frames_that_prompts_share_in_training_fuse_as_frames_of_their_own(model: LlavaMiniForConditionalGeneration):
    rows = [prompt(model.config, [5, 6], 2, [7, 8]), prompt(model.config, [5], 1, [9, 10, 11, 12])]
    tensors = batch(rows)
    labels = tensors["input_ids"].masked_fill(tensors["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    frames, sources = pixels(model.config, 2), torch.tensor([0, 1, 1])
    shared = fuse_shared(model, ModelInputs(**tensors, labels=labels, pixel_values=frames), sources)
    plain = model.fuse(ModelInputs(**tensors, labels=labels, pixel_values=frames[sources]))
    close(shared.inputs_embeds[shared.attention_mask.bool()], plain.inputs_embeds[plain.attention_mask.bool()])
    assert shared.labels is not None
    assert plain.labels is not None
    assert torch.equal(shared.labels, plain.labels)
    assert shared.labels.shape == shared.inputs_embeds.shape[:2]


@torch.inference_mode()
def test_frames_know_of_the_question_only_where_the_method_says_so(model: LlavaMiniForConditionalGeneration):
    image = pixels(model.config, 1)
    first, second = (
        model.fuse(ModelInputs(input_ids=torch.tensor([prompt(model.config, [5, 6], 1, asked)]), pixel_values=image))
        for asked in ([7, 8, 9], [20, 21, 22])
    )
    one, other = (part.inputs_embeds[part.input_ids == IMAGE_TOKEN] for part in (first, second))
    assert torch.equal(one, other) != model.reducer.reads_question


@torch.inference_mode()
def test_a_frame_takes_at_most_its_places(model: LlavaMiniForConditionalGeneration):
    _, frames, inputs = mixed(model, "right")
    taken = (model.fuse(inputs).input_ids == IMAGE_TOKEN).sum(1)
    most = torch.tensor(frames) * model.config.tokens_per_frame
    assert bool((taken[:3] >= 1).all())
    assert bool((taken <= most).all())
    if not model.reducer.is_ragged:
        assert torch.equal(taken, most)


def test_all_weights_of_reducer_and_projector_learn(model: LlavaMiniForConditionalGeneration):
    model.train()
    tensors = batch([prompt(model.config, [5, 6], 1, [7, 8, 9]), prompt(model.config, [5], 2, [11, 12])])
    labels = tensors["input_ids"].clone()
    labels[:, :-1] = -100
    loss = model(**tensors, labels=labels, pixel_values=pixels(model.config, 3)).loss
    loss.backward()
    named = [*model.reducer.named_parameters(), *model.projector.named_parameters()]
    still = [name for name, one in named if one.requires_grad and (one.grad is None or not one.grad.any())]
    assert named
    assert not still


@torch.inference_mode()
def test_a_saved_model_fuses_as_before(model: LlavaMiniForConditionalGeneration, tmp_path: Any):
    _, _, inputs = mixed(model, "right")
    model.save_pretrained(tmp_path)
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(model.fuse(inputs).inputs_embeds, again.fuse(inputs).inputs_embeds)
