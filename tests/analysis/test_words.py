"""Words are what people take for words, and a word that looks at what it names is told from others."""

import pytest
import torch

from llava_mini.analysis.pointing import LINES, pointing
from llava_mini.analysis.words import WordReads, chosen_layers, word_rows, words_of
from llava_mini.checkpoint.locate import locate
from llava_mini.data.records import Noun
from llava_mini.processor.processor import LlavaMiniProcessor


@pytest.fixture(scope="module")
def tokenizer():
    return LlavaMiniProcessor.from_pretrained(locate("tiny")).tokenizer


def test_tokens_of_a_word_stay_together_and_control_tokens_are_no_words(tokenizer):
    ids = tokenizer("<|user|>\nWhere is the zebrafish?<|end|>\nNow")["input_ids"]
    words = words_of(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool), tokenizer)
    assert [word.text for word in words] == ["Where", "is", "the", "zebrafish?", "Now"]
    assert len(words[3].places) > 1
    assert [tokenizer.decode([ids[place] for place in word.places]).strip() for word in words] == [
        word.text for word in words
    ]


def test_only_the_places_of_interest_are_read(tokenizer):
    ids = tokenizer("red green blue")["input_ids"]
    words = words_of(torch.tensor(ids), torch.tensor([True, False, True]), tokenizer)
    assert [word.text for word in words] == ["red", "blue"]
    assert word_rows(words, 4).tolist() == [[True, False, False, False], [False, False, True, False]]


def read(word, row, column, side=6):
    """A word that looks at one patch alone, in two layers."""
    maps = torch.zeros(1, 2, side, side)
    maps[0, :, row, column] = 1
    return WordReads(word=word, share=torch.ones(1, 2), maps=maps)


def test_a_word_that_looks_at_what_it_names_points():
    words = [read("Is", 5, 5), read("the", 5, 5), read("red", 0, 0), read("star", 1, 1), read("big?", 1, 1)]
    here = Noun(phrase="red star", path=((0.25, 0.25),))
    (table,) = pointing(words, [here])
    assert table.shape == (2, len(LINES))
    assert table[0, :2].tolist() == [1.0, pytest.approx(1 / 3)]
    assert 0 < table[0, 2] < 0.25


@pytest.mark.parametrize(
    "noun",
    [
        Noun(phrase="blue star", path=((0.25, 0.25),)),
        Noun(phrase="red star"),
        Noun(phrase="red star", path=(None, (0.5, 0.5))),
        Noun(phrase="red", path=((0.5, 0.5),)),
    ],
    ids=["not named", "not there", "not in the first frame", "named twice"],
)
def test_what_is_not_there_or_not_named_once_is_left_out(noun):
    words = [read("red", 0, 0), read("or", 0, 0), read("red", 0, 0), read("star?", 0, 0)]
    assert pointing(words, [noun]) == []


def test_the_first_and_the_last_layer_are_always_shown():
    assert chosen_layers(3, 6) == [0, 1, 2]
    assert chosen_layers(32, 6) == [0, 6, 12, 19, 25, 31]
    assert chosen_layers(7, 6)[:: len(chosen_layers(7, 6)) - 1] == [0, 6]
