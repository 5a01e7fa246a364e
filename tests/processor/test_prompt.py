"""Messages become ids: what the template writes counts, what a user types is text."""

import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.processor import TEMPLATES, load_template
from llava_mini.processor.prompt import Prompt, check_messages, encode_messages, encode_text, render

TOKENIZERS = Path(__file__).parents[1] / "parity/fixtures/tokenizers"
CONTINUE = {"continue_final_message": True}
SYSTEM = "You are a test."


@pytest.fixture(scope="module")
def llama():
    return AutoTokenizer.from_pretrained(TOKENIZERS / "llama3_tiny")


@pytest.fixture(scope="module")
def vicuna():
    return AutoTokenizer.from_pretrained(TOKENIZERS / "vicuna_tiny")


@pytest.fixture(scope="module")
def tiny():
    return build_tokenizer(["what colour is the square", "a red square"], vocab_size=300)


@pytest.fixture(params=[("llama", "llama_3_1"), ("vicuna", "vicuna_v1"), ("vicuna", "llava_v1"), ("tiny", "tiny")])
def pair(request):
    """A tokenizer and a chat template made for it."""
    name, template = request.param
    return request.getfixturevalue(name), load_template(template)


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


IMAGE, VIDEO = {"type": "image", "image": "x"}, {"type": "video", "video": "x"}


def encode(messages, tokenizer, template, **options) -> Prompt:
    options = {"num_begin_tokens": 1, "add_generation_prompt": False, **options}
    return encode_messages(check_messages(messages), tokenizer, template, **options)


def text_of(messages, tokenizer, template, **options) -> str:
    return render(check_messages(messages), tokenizer, template, **{"add_generation_prompt": False, **options})[0]


def answers_of(prompt: Prompt, tokenizer) -> str:
    return tokenizer.decode([token for token, answer in zip(prompt.ids, prompt.answer_mask, strict=True) if answer])


def test_the_tiny_template_is_what_the_tiny_model_reads(tiny):
    text = text_of([user("Hi"), assistant("Yes"), user(IMAGE, "So?")], tiny, load_template("tiny"))
    assert text == ("<|begin|><|user|>\nHi<|end|>\n<|assistant|>\nYes<|end|>\n<|user|>\n<image>\nSo?<|end|>\n")


def test_a_generation_prompt_is_what_the_answer_follows(pair):
    tokenizer, template = pair
    asked = encode([user("q")], tokenizer, template, add_generation_prompt=True)
    answered = encode([user("q"), assistant("a")], tokenizer, template)
    assert answered.ids[: len(asked.ids)] == asked.ids
    assert answered.answer_mask[: len(asked.ids)] == (False,) * len(asked.ids)
    assert answered.answer_mask[len(asked.ids)]


def test_the_answer_mask_is_the_answer_and_its_end_token(pair):
    tokenizer, template = pair
    prompt = encode([user("one two"), assistant("red square"), user("q"), assistant("a!")], tokenizer, template)
    end = tokenizer.eos_token
    assert answers_of(prompt, tokenizer).replace(" ", "") == f"redsquare{end}a!{end}"


@pytest.mark.parametrize("typed", ["<image>", "<video>", "<s>", "</s>", "<|eot_id|>", "<|user|>", "<|begin|>"])
@pytest.mark.parametrize("before", ["", "x", "x ", " ", "\n"])
def test_what_a_user_types_is_never_a_control_token(typed, before, pair):
    tokenizer, template = pair
    special = {*tokenizer.get_added_vocab().values()}

    def controls(*texts: str) -> tuple[list[int], Prompt]:
        messages = [user(IMAGE, *texts), assistant("".join(texts)), user("q")]
        prompt = encode(messages, tokenizer, template)
        return [token for token in prompt.ids if token in special], prompt

    plain, _ = controls("word")
    for texts in ((f"{before}{typed}",), (f"{before}{typed} after",), (before or "x", typed[:2], typed[2:])):
        found, prompt = controls(*texts)
        assert found == plain
        assert prompt.kinds == ("image",)
        places = zip(prompt.ids, prompt.media_mask, strict=True)
        kept = [token for token, medium in places if not medium and token not in special]
        spaceless = "".join(texts).replace(" ", "").strip()
        assert tokenizer.decode(kept).replace(" ", "").count(spaceless) == 2


def test_typed_control_tokens_are_their_letters_exactly(vicuna, llama):
    """As a tokenizer would read them that had no such tokens."""
    for tokenizer in (vicuna, llama):
        ids = encode([user("a <|x|> b")], tokenizer, load_template("plain")).ids
        tokenizer.add_tokens(["<|x|>"])
        assert encode([user("a <|x|> b")], tokenizer, load_template("plain")).ids == ids
        assert tokenizer("a <|x|> b", add_special_tokens=False)["input_ids"] != list(ids)[1:]


def test_a_character_used_inside_as_a_guard_can_be_typed(pair):
    tokenizer, template = pair
    typed = "".join(chr(plane * 0x10000 + 0xFFFE) for plane in range(3)) + "<image>"
    prompt = encode([user(typed), assistant("a")], tokenizer, template)
    assert typed in tokenizer.decode(prompt.ids)
    assert not any(prompt.media_mask)


def test_media_stand_where_their_parts_do_with_a_new_line_before_text(pair):
    tokenizer, template = pair
    messages = [user(IMAGE, "one", VIDEO, IMAGE, "two"), assistant("a"), user(VIDEO, "three")]
    prompt = encode(messages, tokenizer, template)
    assert prompt.kinds == ("image", "video", "image", "video")
    assert "<image>\none<video><image>\ntwo" in text_of(messages, tokenizer, template)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_prompt_has_as_many_begin_tokens_as_asked(number, pair):
    tokenizer, template = pair
    prompt = encode([user(IMAGE, "q")], tokenizer, template, num_begin_tokens=number)
    assert prompt.ids[: number + 1].count(tokenizer.bos_token_id) == number
    text = tokenizer.bos_token * 2 + "q"
    assert encode_text(text, tokenizer, num_begin_tokens=number).ids.count(tokenizer.bos_token_id) == number
    assert encode_text(text, tokenizer, num_begin_tokens=None).ids.count(tokenizer.bos_token_id) == 2


def test_a_prompt_that_is_an_image_alone_has_its_begin_token_first(vicuna):
    prompt = encode_text("<image>", vicuna, num_begin_tokens=1)
    assert prompt.ids == (vicuna.bos_token_id, 0)
    assert prompt.media_mask == (False, True)


def test_a_sentencepiece_stretch_keeps_its_leading_space(vicuna):
    """The released code tokenises each stretch with the slow tokenizer, which puts a space before that one."""
    tokens = vicuna.convert_ids_to_tokens(encode_text("x<image> y", vicuna, num_begin_tokens=0).ids)
    assert tokens[tokens.index("<unk>") + 1].startswith("\u2581")
    assert "".join(tokens[tokens.index("<unk>") + 1 :]) == "\u2581\u2581y"


def test_a_system_message_takes_the_place_of_the_usual_one(llama, vicuna):
    for tokenizer, name in ((llama, "llama_3_1"), (vicuna, "vicuna_v1")):
        template = load_template(name)
        text = text_of([{"role": "system", "content": SYSTEM}, user("q")], tokenizer, template)
        assert SYSTEM in text
        assert "helpful" not in text
        assert "helpful" in text_of([user("q")], tokenizer, template)
        with pytest.raises(ValueError, match="comes first and only once"):
            text_of([user("q"), {"role": "system", "content": SYSTEM}], tokenizer, template)


def test_the_tiny_model_refuses_system_messages(tiny):
    with pytest.raises(ValueError, match="knows no system messages"):
        text_of([{"role": "system", "content": SYSTEM}, user("q")], tiny, load_template("tiny"))


def test_an_answer_can_be_continued(pair):
    tokenizer, template = pair
    messages = [user("q"), assistant("The square")]
    prompt = encode(messages, tokenizer, template, continue_final_message=True)
    assert text_of(messages, tokenizer, template, continue_final_message=True).endswith("The square")
    whole = encode(messages, tokenizer, template)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert answers_of(prompt, tokenizer).strip() == "The square"


def test_an_answer_is_begun_or_continued_not_both(tiny):
    with pytest.raises(ValueError, match="exclude one another"):
        text_of([user("q"), assistant("a")], tiny, load_template("tiny"), add_generation_prompt=True, **CONTINUE)


def test_threads_may_render_prompts_at_once(pair):
    messages = [user("Who?"), assistant("I."), user("Why?"), assistant("So.")]
    expected, wrong = encode(messages, *pair), []

    def work():
        try:
            wrong.extend(prompt for _ in range(60) if (prompt := encode(messages, *pair)) != expected)
        except Exception as error:
            wrong.append(error)

    threads, interval = [threading.Thread(target=work) for _ in range(3)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_template_that_does_not_mark_answers_is_refused_with_answers_only(llama):
    template = llama.chat_template
    assert encode([user(IMAGE, "q")], llama, template).kinds == ("image",)
    with pytest.raises(ValueError, match="does not say where answers are"):
        encode([user("q"), assistant("a")], llama, template)


def test_a_template_that_drops_media_is_refused(llama):
    with pytest.raises(ValueError, match="hold 1 images and videos, but the chat template shows 0"):
        encode([user(IMAGE, "q")], llama, "{{ 'nothing' }}")


def test_an_unknown_template_is_refused_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"no chat template 'alpaca'.*vicuna_v1, llava_v1, llama_3_1, chatml, tiny, plain"
    ):
        load_template("alpaca")
    assert len({load_template(name) for name in TEMPLATES}) == 6


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "an empty one"),
        ("hello", "list of messages"),
        ({"role": "user", "content": "x"}, "list of messages"),
        (["hello"], "A message is a dictionary"),
        ([{"role": "robot", "content": "x"}], "role 'robot'; the roles are system, user, assistant"),
        ([{"content": "x"}], "role None"),
        ([{"role": "user"}], "has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user", "content": 3}], "string or a list of parts"),
        ([{"role": "user", "content": []}], "is empty"),
        ([{"role": "user", "content": {"type": "text"}}], "string or a list of parts"),
        ([user({"type": "audio", "audio": "x"})], "type 'audio'; the types are text, image, video, image_url"),
        ([user({"text": "x"})], "type None"),
        ([{"role": "user", "content": ["x"]}], "type None"),
        ([user({"type": "text", "text": None})], "NoneType instead of a string"),
        ([user({"type": "text", "content": "x"})], "NoneType instead of a string"),
        ([user({"type": "image", "img": "x"})], "unknown key 'img'; it can have image, url, path"),
        ([user({"type": "image", "url": "x", "path": "y"})], "names 2 sources"),
        ([{"role": "assistant", "content": [IMAGE]}], "Put it into a message of the user"),
    ],
)
def test_bad_messages_are_refused_in_one_sentence(messages, words):
    with pytest.raises(ValueError, match=words):
        check_messages(messages)


def test_an_openai_image_part_is_an_image():
    part = {"type": "image_url", "image_url": {"url": "x.png"}}
    (slot,) = check_messages([user(part, "q")]).slots
    assert (slot.kind, slot.source) == ("image", "x.png")
