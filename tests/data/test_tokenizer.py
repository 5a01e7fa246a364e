import pytest
from transformers import AutoTokenizer

from llava_mini.data.tokenizer import BEGIN, END, SPECIAL_TOKENS, build_tokenizer, read_tokenizer, write_tokenizer

TEXTS = ["What color is the red circle?", "the red circle", "blue square"] * 20


def test_common_words_are_one_token_and_digits_stand_alone():
    tokenizer = build_tokenizer(TEXTS, vocab_size=400)
    assert len(tokenizer.encode("the red circle", add_special_tokens=False)) == 3
    assert len(tokenizer.encode("407", add_special_tokens=False)) == 3


def test_control_tokens_have_the_first_ids():
    tokenizer = build_tokenizer(TEXTS, vocab_size=400)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_any_text_comes_back_as_it_was_after_saving(tmp_path):
    build_tokenizer(TEXTS, vocab_size=400).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "  What is \u4e2d\u6587 \u00e9 \U0001f600?\n\tred, circle !"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_one_file_keeps_a_tokenizer(tmp_path):
    before = build_tokenizer(TEXTS, vocab_size=400)
    write_tokenizer(before, tmp_path / "tokenizer.json")
    after = read_tokenizer(tmp_path / "tokenizer.json")
    text = f"{BEGIN}the red circle{END}"
    assert after.encode(text) == before.encode(text)
    assert after.get_vocab() == before.get_vocab()
    assert after.special_tokens_map == before.special_tokens_map


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 261"):
        build_tokenizer(TEXTS, vocab_size=200)
