"""LLaMA-VID: the context token against a plain form, the content tokens, and what of a question is read."""

import torch
from torch.nn import functional

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.reducers.base import Question
from llava_mini.model.reducers.llama_vid import MAX_WORDS, NUM_QUERIES, LlamaVid, last_words, qformer_sizes
from tests.tiny_models import pixels, tiny_model


def llama_vid(grid: int = 1) -> LlavaMiniForConditionalGeneration:
    return tiny_model(reducer="llama_vid", reducer_grid=grid, prefusion_num_layers=0)


def asked(lengths: list[int]) -> Question:
    torch.manual_seed(3)
    embeds = torch.randn(len(lengths), max(lengths), 32)
    return Question(embeds, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@torch.no_grad()
def test_the_context_token_equals_the_plain_form():
    model = llama_vid()
    made, patches, question = model.reducer, model.encode_frames(pixels(model.config, 3))[:, 0], asked([4, 1, 2])
    assert isinstance(made, LlamaVid)
    queries = made.query_map(made._read(patches, question))
    scores = (queries @ made.key_map(patches).transpose(1, 2) / patches.shape[-1] ** 0.5).softmax(-1)
    context = made.context_map((scores @ patches).mean(1, keepdim=True))
    reduced = made(patches, question)
    assert reduced.projected is not None
    assert reduced.attention is not None
    torch.testing.assert_close(reduced.projected, context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reduced.attention[:, :1], scores.mean(1, keepdim=True), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_frame_is_its_context_and_then_its_content():
    model = llama_vid(grid=2)
    patches, question = model.encode_frames(pixels(model.config, 2))[:, 0], asked([3, 2])
    whole, reduced = model._reduce(patches, question).tokens, model.reducer(patches, question)
    square = patches.transpose(1, 2).unflatten(2, (4, 4))
    content = functional.adaptive_avg_pool2d(square, 2).flatten(2).transpose(1, 2)
    assert whole.shape == (2, model.config.tokens_per_frame, 32) == (2, 5, 32)
    assert reduced.projected is not None
    torch.testing.assert_close(whole[:, :1], reduced.projected)
    torch.testing.assert_close(whole[:, 1:], model.projector(content))
    assert reduced.attention is not None
    torch.testing.assert_close(reduced.attention[:, 1:] @ patches, content)
    torch.testing.assert_close(reduced.attention.sum(-1), torch.ones(2, 5))


@torch.no_grad()
def test_the_question_changes_the_context_token_alone():
    model = llama_vid()
    patches = model.encode_frames(pixels(model.config, 1))[:, 0]
    first = model._reduce(patches, asked([3])).tokens
    second = model._reduce(patches, asked([5])).tokens
    assert not torch.allclose(first[:, 0], second[:, 0], atol=1e-4)
    assert torch.equal(first[:, 1], second[:, 1])


def test_of_a_long_question_the_last_words_are_read():
    lengths = [MAX_WORDS + 7, 2]
    question = asked(lengths)
    words, valid = last_words(question)
    assert words.shape == (2, MAX_WORDS, 32)
    assert torch.equal(words[0], question.embeds[0, 7:])
    assert torch.equal(words[1, :2], question.embeds[1, :2])
    assert valid.sum(1).tolist() == [MAX_WORDS, 2]


def test_the_q_former_of_clip_vit_large_is_as_large_as_bert_base():
    sizes = qformer_sizes(LlavaMiniConfig())
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads, sizes.intermediate_size) == (
        768,
        12,
        12,
        3072,
    )
    assert NUM_QUERIES == 32
