"""Attention that is reduced while it is made says what the whole of it says."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, BloomConfig

from llava_mini.analysis.attention_stats import PARTS, AttentionRecorder, Spread, token_parts
from llava_mini.analysis.kernels import kernel_in, watching
from tests.analysis.subjects import asked, ours, peer

ANSWER = (70, 71, 72, 73)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def whole_attention(subject, embeds):
    """[layers, S, S], mean over heads, by transformers' own eager attention, all of it at once."""
    before = subject.decoder.config._attn_implementation
    subject.decoder.set_attn_implementation("eager")
    with torch.no_grad():
        weights = subject.decoder(inputs_embeds=embeds[None], use_cache=False, output_attentions=True).attentions
    subject.decoder.set_attn_implementation(before)
    return torch.stack([layer[0].mean(0) for layer in weights]).double()


def with_answer(subject, prompted):
    written = subject.decoder.get_input_embeddings()(torch.tensor(ANSWER))
    return torch.cat([prompted.embeds, written]).detach()


def by_hand(weights, parts):
    """Equations 4 and 5 and the entropies of appendix A, pair by pair, token by token: [A, B] each."""
    share, entropy, evenness = (torch.full((len(parts), len(parts)), math.nan).double() for _ in range(3))
    for a, source in enumerate(parts):
        for b, target in enumerate(parts):
            rows = [weights[i][target] for i in source.nonzero()[:, 0]]
            if not rows:
                continue
            share[a, b] = sum(float(row.sum()) for row in rows) / len(rows)
            seeing = [row[row > 0] / row.sum() for row in rows if row.sum() > 0]
            entropies = [float(-(row * row.log()).sum()) for row in seeing]
            if entropies:
                entropy[a, b] = sum(entropies) / len(entropies)
            shares = [one / math.log(len(row)) for one, row in zip(entropies, seeing, strict=True) if len(row) > 1]
            if shares:
                evenness[a, b] = sum(shares) / len(shares)
    return share, entropy, evenness


@pytest.fixture(scope="module", params=["identity", *FAMILIES, "llava", "llava_next"])
def subject(request):
    if request.param.startswith("llava"):
        return peer(request.param)
    if request.param == "identity":
        return ours(reducer="identity", prefusion_num_layers=0)
    return ours(family=request.param, reducer_grid=2)


@pytest.fixture(scope="module")
def prompted(subject):
    return subject.prompt(asked(size=(24, 10)))


def test_statistics_equal_those_of_whole_eager_attention(subject, prompted):
    stats = subject.watch(prompted, ANSWER).stats
    weights = whole_attention(subject, with_answer(subject, prompted))
    parts = token_parts(prompted.is_vision, len(ANSWER))
    for layer, whole in enumerate(weights):
        share, entropy, evenness = by_hand(whole, parts)
        torch.testing.assert_close(stats.share[layer], share, atol=1e-5, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(stats.entropy[layer], entropy, atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(stats.evenness[layer], evenness, atol=1e-4, rtol=1e-4, equal_nan=True)
        received = whole[parts[PARTS.index("reading")]].mean(0)
        torch.testing.assert_close(
            stats.received[layer, PARTS.index("reading")].double(), received, atol=1e-5, rtol=1e-4
        )


def test_what_a_type_attends_to_adds_up_to_1(subject, prompted):
    share = subject.watch(prompted, ANSWER).stats.share
    types = [PARTS.index(name) for name in ("instruction", "vision", "response")]
    rows = share[:, types][:, :, types].sum(2)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


def test_a_row_at_a_time_says_the_same_as_all_rows_at_once(subject, prompted):
    one, all_ = (subject.watch(prompted, ANSWER, most_weights=most).stats for most in (1, 1 << 30))
    for name in ("share", "entropy", "evenness", "received"):
        torch.testing.assert_close(getattr(one, name), getattr(all_, name), atol=1e-5, rtol=1e-4, equal_nan=True)


def test_no_more_weights_than_asked_for_are_in_memory(subject, prompted):
    told, heads = [], 4
    embeds = with_answer(subject, prompted)
    most = 3 * heads * len(embeds)
    watched = {module: lambda _, weights: told.append(heads * weights.numel()) for module in subject.attentions}
    with kernel_in(subject.decoder, watching(watched, most)), torch.no_grad():
        subject.decoder(inputs_embeds=embeds[None], use_cache=False)
    assert max(told) == most
    assert len(told) == len(subject.attentions) * math.ceil(len(embeds) / 3)


def test_a_prompt_without_padding_needs_no_mask_of_rows_by_keys(subject, prompted):
    masks = []
    kernel = watching({module: lambda *_: None for module in subject.attentions})

    def noting(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return kernel(module, query, key, value, attention_mask, **kwargs)

    with kernel_in(subject.decoder, noting), torch.no_grad():
        subject.decoder(inputs_embeds=prompted.embeds[None], use_cache=False)
    assert masks == [None] * len(subject.attentions)


def test_watching_changes_no_hidden_state_and_leaves_the_model_as_it_was(subject, prompted):
    before = subject.decoder.config._attn_implementation
    embeds = with_answer(subject, prompted)
    with torch.no_grad():
        plain = subject.decoder(inputs_embeds=embeds[None], use_cache=False)[0]
        recorder = AttentionRecorder(*[token_parts(prompted.is_vision, len(ANSWER))] * 2, len(subject.attentions))
        watched = {module: recorder.listener(layer) for layer, module in enumerate(subject.attentions)}
        with kernel_in(subject.decoder, watching(watched, 1000)):
            seen = subject.decoder(inputs_embeds=embeds[None], use_cache=False)[0]
    torch.testing.assert_close(seen, plain, atol=1e-4, rtol=1e-4)
    assert subject.decoder.config._attn_implementation == before


def test_each_token_has_one_type_and_parts_are_where_they_should_be():
    is_vision = torch.tensor([False, False, True, True, False, False])
    parts = dict(zip(PARTS, token_parts(is_vision, 2).int().tolist(), strict=True))
    assert parts == {
        "instruction": [1, 1, 0, 0, 1, 1, 0, 0],
        "vision": [0, 0, 1, 1, 0, 0, 0, 0],
        "response": [0, 0, 0, 0, 0, 0, 1, 1],
        "before the image": [1, 1, 0, 0, 0, 0, 0, 0],
        "after the image": [0, 0, 0, 0, 1, 1, 0, 0],
        "first token": [1, 0, 0, 0, 0, 0, 0, 0],
        "reading": [0, 0, 0, 0, 1, 1, 1, 1],
    }


def test_without_an_answer_nothing_attends_from_it(subject, prompted):
    share = subject.watch(prompted, ()).stats.share
    assert share[:, PARTS.index("response")].isnan().all()
    assert share[:, PARTS.index("instruction"), PARTS.index("vision")].isfinite().all()


def test_the_entropy_of_attention_to_a_single_token_is_0():
    subject = ours()
    stats = subject.watch(subject.prompt(asked()), ANSWER).stats
    assert set(stats.entropy[:, PARTS.index("response"), PARTS.index("vision")].tolist()) == {0.0}


def test_a_spread_leaves_out_prompts_that_have_no_value():
    tables = [torch.tensor([[[1.0, math.nan]]]), torch.tensor([[[3.0, 5.0]]]), torch.tensor([[[math.nan, math.nan]]])]
    spread = Spread.of(tables)
    assert spread.mean.tolist() == [[[2.0, 5.0]]]
    assert spread.count.tolist() == [[[2, 1]]]
    assert spread.deviation[0, 0, 0] == pytest.approx(2**0.5)
    assert spread.error[0, 0].tolist() == pytest.approx([1.96, 0])


def test_where_a_word_looks_is_the_attention_of_its_tokens(subject, prompted):
    words = subject.watch(prompted, ANSWER).words
    if prompted.canvases[0].paint is None:
        assert not words
        return
    weights = whole_attention(subject, with_answer(subject, prompted))
    assert [word.word for word in words] == [word.text for word in prompted.words]
    assert "What is it?" in " ".join(word.word for word in words)
    for read, word in zip(words, prompted.words, strict=True):
        rows = weights[:, list(word.places), : len(prompted.is_vision)].mean(1)[:, prompted.is_vision]
        painted = torch.stack([prompted.canvases[0].paint(row.float()) for row in rows])
        torch.testing.assert_close(read.maps[0] * read.share[0, :, None, None], painted, atol=1e-5, rtol=1e-4)


def test_a_language_model_of_another_kind_is_refused():
    torch.manual_seed(0)
    other = AutoModel.from_config(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with (
        pytest.raises(ValueError, match="attention of a BloomModel cannot be watched"),
        kernel_in(other, watching({})),
    ):
        pass
    strange = replace(ours(), decoder=other)
    with pytest.raises(ValueError, match="is a BloomModel, whose layers have no self_attn"):
        strange.attentions  # noqa: B018
