"""What a front end hands over is what its model reads, and maps lie where the patches are."""

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini.analysis.attention_stats import PARTS
from llava_mini.analysis.drop_layers import answer_without
from llava_mini.analysis.fusion import SOURCES, TEXTS
from llava_mini.analysis.kernels import kernel_in, watching
from llava_mini.analysis.ours import our_subject
from llava_mini.analysis.peers import peer_subject
from llava_mini.model.reducers import Reduced, Reducer
from tests.analysis.subjects import asked, our_parts, ours, peer, peer_parts
from tests.model.reducers.test_contract import METHODS
from tests.tiny_engine import write_film

REDUCERS = [
    {"reducer": "identity", "prefusion_num_layers": 0},
    {"reducer": "query", "reducer_grid": 2},
    {"reducer": "average_pool", "reducer_grid": 2, "vision_tokens_from": "reducer"},
    {"reducer": "query", "resolution_ratio": 2},
    {"reducer": "identity", "resolution_ratio": 2},
]


def subject_of(model, processor, num_shown=2):
    return our_subject("ours", model, processor, num_frames=None, num_shown=num_shown)


def inputs_of(processor, question, **reading):
    """What a model of transformers reads when a question is asked."""
    return processor.apply_chat_template(
        question.messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **reading
    )


@pytest.mark.parametrize("fields", REDUCERS, ids=str)
@pytest.mark.parametrize("frames", [0, 3])
def test_our_prompt_is_what_the_model_fuses(fields, frames):
    model, processor = our_parts(**fields)
    question = asked(frames=frames)
    prompted = subject_of(model, processor).prompt(question)
    inputs = inputs_of(processor, question, all_frames=True)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        ours_ = model.language_model(inputs_embeds=prompted.embeds[None]).logits[0, -1]
    torch.testing.assert_close(ours_, logits, atol=1e-4, rtol=1e-4)
    assert prompted.is_vision.tolist() == (inputs["input_ids"][0] == model.config.image_token_id).tolist()
    assert prompted.tokens_of_frames == [model.config.tokens_per_frame] * max(frames, 1)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_a_peers_prompt_is_what_its_model_reads(kind):
    model, processor = peer_parts(kind)
    question = asked(size=(24, 10))
    prompted = peer(kind).prompt(question)
    inputs = inputs_of(processor, question)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        theirs = model(inputs_embeds=prompted.embeds[None]).logits[0]
    torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
    assert prompted.is_vision.tolist() == (inputs["input_ids"][0] == model.config.image_token_id).tolist()
    assert sum(prompted.tokens_of_frames) == int(prompted.is_vision.sum())


def test_an_answer_is_the_models_greedy_one_without_its_end():
    model, processor = our_parts()
    subject, question = subject_of(model, processor), asked()
    inputs = inputs_of(processor, question)
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(subject.answer(subject.prompt(question), 5)) == made
    model.generation_config.eos_token_id = made[2]
    stopped = subject_of(model, processor)
    assert list(stopped.answer(stopped.prompt(question), 5)) == made[: made.index(made[2])]


def brightness(side):
    """A picture of side x side cells, each of its own brightness, 3 pixels a cell."""
    values = np.linspace(0, 255, side * side).round().astype(np.uint8).reshape(side, side)
    return Image.fromarray(np.kron(values, np.ones((3, 3), np.uint8))).convert("RGB")


def test_the_map_of_all_tokens_has_each_patch_in_its_place():
    model, processor = our_parts(reducer="identity", prefusion_num_layers=0)
    canvas = subject_of(model, processor).prompt(asked(frames=2)).canvases[1]
    painted = canvas.paint(torch.arange(32.0))
    assert painted.tolist() == torch.arange(16.0, 32).view(4, 4).tolist()
    assert canvas.picture.shape == (8, 8, 3)


def test_hd_pictures_are_put_together_of_their_crops():
    model, processor = our_parts(reducer="identity", resolution_ratio=2)
    grid, whole = subject_of(model, processor).prompt(asked(size=(64, 64))).canvases
    assert grid.picture.shape == (16, 16, 3)
    assert whole.picture.shape == (8, 8, 3)
    assert grid.paint(torch.arange(80.0)).tolist() == torch.arange(64.0).view(8, 8).tolist()
    assert whole.paint(torch.arange(80.0)).tolist() == torch.arange(64.0, 80).view(4, 4).tolist()
    shrunk = torch.tensor(grid.picture).float().view(8, 2, 8, 2, 3).mean((1, 3))
    assert float((shrunk - torch.tensor(whole.picture).float()).abs().mean()) < 25  # the same picture, resized twice


def test_compressed_tokens_are_laid_out_over_what_they_looked_at():
    model, processor = our_parts(reducer="query", reducer_grid=2)
    prompted = subject_of(model, processor).prompt(asked())
    looks = prompted.looks[0].maps
    assert looks.shape == (4, 4, 4)
    torch.testing.assert_close(looks.sum((1, 2)), torch.ones(4))
    values = torch.tensor([0.1, 0.2, 0.3, 0.4])
    painted = prompted.canvases[0].paint(values)
    torch.testing.assert_close(painted, (values[:, None, None] * looks).sum(0))


@pytest.mark.parametrize("method", [*METHODS, "nowhere"])
def test_every_method_is_read_as_it_is_or_refused(method):
    """Statistics add up, an answer is the model's own, also where the language model has to be told of frames."""
    fields = METHODS.get(method, {"vision_tokens_from": "nowhere"})
    model, processor = our_parts(text={"eos_token_id": None}, **fields)
    question = asked(frames=2)
    if model.reducer.drops_inside:
        with pytest.raises(ValueError, match="drops rows inside the language model"):
            subject_of(model, processor)
        return
    subject = subject_of(model, processor)
    prompted = subject.prompt(question)
    assert sum(prompted.tokens_of_frames) == int(prompted.is_vision.sum())
    inputs = inputs_of(processor, question, all_frames=True)
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(subject.answer(prompted, 4)) == made
    share = subject.watch(prompted, (70, 71)).stats.share
    types = [PARTS.index(name) for name in ("instruction", "vision", "response")]
    rows = share[:, PARTS.index("response"), types].sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)
    assert bool((share[:, PARTS.index("response"), types[1]] > 0).all()) == (method != "nowhere")
    assert len(answer_without(subject, prompted, 0, 3, 2)) == 2
    total = torch.rand(int(prompted.is_vision.sum()))
    assert all(canvas.paint(total).dim() == 2 for canvas in prompted.canvases if canvas.paint is not None)


class Uneven(Reducer):
    """Three tokens of the first frame and one of the second, each of one patch."""

    is_ragged = True

    def forward(self, patches):
        """patches: [F, N, E]."""
        valid = torch.tensor([[True, False, True, True], [False, False, False, True]])
        attention = torch.eye(patches.shape[1])[:4].expand(len(patches), -1, -1)
        return Reduced(patches[:, :4], attention, valid)


def test_frames_of_unequal_numbers_of_tokens_have_theirs():
    model, processor = our_parts(reducer="query", reducer_grid=2, prefusion_num_layers=0)
    model.reducer = Uneven(model.config)
    prompted = subject_of(model, processor).prompt(asked(frames=2))
    assert prompted.tokens_of_frames == [3, 1]
    assert int(prompted.is_vision.sum()) == 4
    assert [len(look.maps) for look in prompted.looks] == [3, 1]
    first, second = prompted.canvases
    painted = first.paint(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(painted[0], torch.tensor([0.1, 0.0, 0.2, 0.3]))
    assert second.paint is None


def test_tiles_of_llava_next_have_each_patch_in_its_place():
    subject = peer("llava_next")
    wide = Image.new("RGB", (40, 16))  # two tiles side by side, with padding above and below
    question = asked()
    question.messages[0]["content"][0] = {"type": "image", "image": wide}
    whole, tiles = subject.prompt(question).canvases
    count = subject.prompt(question).tokens_of_frames[0]
    assert whole.paint(torch.arange(float(count))).tolist() == torch.arange(16.0).view(4, 4).tolist()
    painted = tiles.paint(torch.arange(float(count)))
    rows, columns = painted.shape
    assert 16 + rows * (columns + 1) == count
    assert painted[1, 0] == 16 + columns + 1
    assert tiles.picture.shape == (2 * rows, 2 * columns, 3)


@pytest.mark.parametrize("fields", [REDUCERS[1], REDUCERS[2], REDUCERS[4]], ids=str)
def test_what_words_read_in_prefusion_is_the_attention_of_their_rows(fields):
    model, processor = our_parts(**fields)
    question = asked(question="Red or blue?", frames=2)
    prompted = subject_of(model, processor).prompt(question)
    fusion, config = prompted.fusion, model.config
    inputs = processor.stream(question.messages, all_frames=True)
    text = model.text_rows(inputs)
    pixels = torch.cat([chunk.pixel_values for chunk in inputs.pixel_values])
    told = {}
    modules = [layer.block.self_attn for layer in model.prefusion.layers]
    watched = {
        module: lambda position, weights, at=at: told.update({(at, position): weights})
        for at, module in enumerate(modules)
    }
    with torch.no_grad(), kernel_in(model.language_model, watching(watched, 1 << 30)):
        patches, reduced = model.reduce_frames(model.encode_frames(pixels))
        model.read(patches, reduced, text.packed.embeds.expand(2, -1, -1))
    position = max(at for _, at in told)
    weights = torch.stack([told[layer, position] for layer in range(2)], dim=1)  # [F, L, T, keys]
    num_patches = config.patches_per_frame
    places = [[index] for index, token in enumerate(text.ids[0][text.visible[0]].tolist()) if token > 4]
    tokens = processor.tokenizer.convert_ids_to_tokens(text.ids[0][text.visible[0]].tolist())
    assert [word.word for word in fusion.words] == ["Red", "or", "blue?"]
    start = tokens.index("R")
    assert [start] in places
    red = weights[:, :, start : start + 3, :num_patches].mean(2)
    torch.testing.assert_close(fusion.words[0].share, red.sum(2), atol=1e-5, rtol=1e-4)
    side = fusion.words[0].maps.shape[-1]
    first = (red / red.sum(2, keepdim=True))[..., : side * side].unflatten(2, (side, side))
    torch.testing.assert_close(fusion.words[0].maps, first, atol=1e-5, rtol=1e-4)
    after = TEXTS.index("after the image")
    rows = weights[:, :, text.is_image[0].nonzero()[0, 0] :]
    shares = rows[..., :num_patches].sum(3).mean((0, 2)).double()
    torch.testing.assert_close(fusion.stats.share[:, after, SOURCES.index("patches")], shares, atol=1e-5, rtol=1e-4)
    totals = fusion.stats.share.sum(2)
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-5, rtol=0)


def test_only_the_first_frames_of_a_long_video_keep_their_maps():
    subject = ours(num_shown=2, text={"max_position_embeddings": 4096})
    prompted = subject.prompt(asked(frames=40))
    assert len(prompted.canvases) == len(prompted.looks) == 2
    assert prompted.fusion.words[0].maps.shape[0] == 2
    assert sum(prompted.tokens_of_frames) == 40


def test_a_film_is_seen_once_a_second_or_through_so_many_frames(tmp_path):
    film = write_film(tmp_path / "film.mp4", seconds=3)
    question = asked()
    question.messages[0]["content"][0] = {"type": "video", "video": film}
    model, processor = our_parts()
    assert len(subject_of(model, processor).prompt(question).tokens_of_frames) == 3
    two = our_subject("ours", model, processor, num_frames=2, num_shown=1)
    prompted = two.prompt(question)
    assert len(prompted.tokens_of_frames) == 2
    assert len(prompted.canvases) == 1


def test_the_model_of_a_prompt_is_left_as_it_was():
    model, processor = our_parts()
    before = model.config.text_config._attn_implementation
    subject = subject_of(model, processor)
    with pytest.raises(ValueError, match="holds 512"):
        subject.prompt(asked(question="a " * 600))
    assert model.config.text_config._attn_implementation == before
    assert not model.reducer._forward_hooks


def test_a_prompt_that_fills_the_context_is_refused():
    subject = ours(reducer="identity", text={"max_position_embeddings": 64})
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model's context holds 64"):
        subject.prompt(asked(frames=4))


def test_a_processor_without_a_chat_template_is_refused():
    model, processor = peer_parts("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        peer_subject("llava", model, processor, num_shown=1)
