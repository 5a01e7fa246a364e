"""Engine: answers are those of the model, streamed, with memory that does not grow with the film."""

import weakref

import numpy as np
import pytest
import torch

from llava_mini.inference import loading, memory
from llava_mini.inference.engine import Engine
from llava_mini.inference.settings import NO_CACHING, AnswerSettings, Caching
from llava_mini.inference.stats import PARTS
from llava_mini.processor.media_stream import MediaStream
from tests.tiny_engine import picture, save_tiny, tiny_engine, tiny_parts, write_film


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def film(tmp_path):
    return write_film(tmp_path / "film.mp4")


def plain_answer(engine, messages, **options):
    """What the model's own ``generate`` says."""
    inputs = engine.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    ids = engine.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return engine.processor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()


def user(*parts):
    kinds = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p[0], p[0]: p[1]} for p in parts]
    return {"role": "user", "content": kinds}


def test_answers_are_those_of_generate(engine, film):
    image = picture()
    for media, parts in [
        (image, [("image", image)]),
        ([image, picture(1)], [("image", image), ("image", picture(1))]),
        (film, [("video", film)]),
        ([film, image], [("video", film), ("image", image)]),
        ((), []),
    ]:
        assert engine.ask("what?", media, max_tokens=12).text == plain_answer(engine, [user(*parts, "what?")])


def test_a_number_of_tokens_set_later_holds_also_for_frames_that_were_seen_before():
    fields = {"reducer": "mqt", "reducer_tokens": 4, "prefusion_num_layers": 0}
    engine = Engine(*tiny_parts(fields=fields))
    for count in (4, 1, 3):
        engine.model.config.reducer_tokens = count
        fresh = Engine(*tiny_parts(fields={**fields, "reducer_tokens": count}))
        fresh.model.load_state_dict(engine.model.state_dict())
        answer = engine.ask("what?", picture(), max_tokens=6)
        assert answer.text == fresh.ask("what?", picture(), max_tokens=6).text
        assert answer.stats.vision_tokens == count


def test_streamed_pieces_add_up_to_the_answer(engine, film):
    answer = engine.ask("what?", film, max_tokens=12)
    stream = engine.stream("what?", film, max_tokens=12)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.text == answer.text == str(answer)
    assert stream.stats.answer_tokens == answer.stats.answer_tokens == 12


@pytest.mark.parametrize(
    ("choice", "frames"), [({}, 3), ({"num_frames": 5}, 5), ({"fps": 2.0}, 6), ({"all_frames": True}, 12)]
)
def test_stats_count_frames_and_tokens(engine, film, choice, frames):
    engine = Engine(engine.model, engine.processor, NO_CACHING)
    stats = engine.ask("what?", [film, picture()], max_tokens=4, **choice).stats
    messages = [user(("video", film), ("image", picture()), "what?")]
    assert stats.frames == stats.vision_tokens == frames + 1
    assert stats.text_tokens == engine.processor.prompt_length(messages)
    assert (stats.answer_tokens, stats.finish_reason) == (4, "length")
    assert set(stats.seconds) == set(PARTS)
    assert min(stats.seconds.values()) > 0


def test_a_question_without_media_takes_no_time_for_vision(engine):
    stats = engine.ask("what?", max_tokens=2).stats
    assert stats.frames == stats.vision_tokens == 0
    assert [part for part, seconds in stats.seconds.items() if seconds] == ["prefill", "generation"]


def test_measuring_leaves_the_model_as_it_was(engine):
    before = dict(vars(engine.model))
    engine.ask("what?", picture(), max_tokens=2)
    with pytest.raises(ValueError, match="no file"):
        engine.ask("what?", [{"type": "image", "image": "nowhere.png"}])
    assert vars(engine.model) == before


def test_frames_are_read_when_the_model_is_ready_for_them_and_let_go(engine, monkeypatch):
    """At any time there are at most two chunks: the one the model works on, or has just left, and the next."""
    made, alive, counts = [], [], []

    def frames():
        for index in range(100):
            made.append(index)
            yield picture(index)

    chunks = MediaStream.chunks

    def watched(media, index):
        for chunk in chunks(media, index):
            alive.append(weakref.ref(chunk.pixel_values))
            counts.append((len(made), sum(reference() is not None for reference in alive)))
            yield chunk
            del chunk

    monkeypatch.setattr(MediaStream, "chunks", watched)
    stats = engine.ask("what?", frames(), max_tokens=1).stats
    assert stats.frames == 100
    assert [read for read, _ in counts] == [min(8 * n, 100) for n in range(1, 14)]
    assert max(living for _, living in counts) <= 2


@pytest.mark.parametrize("caching", [NO_CACHING, Caching()], ids=["anew", "known"])
@pytest.mark.parametrize(
    ("order", "told"),
    [("film", [(8, 10), (10, 10)]), ("picture film", [(1, None), (9, 11), (11, 11)]), ("film picture", [(11, 11)])],
)
def test_frames_are_told_while_they_are_read(engine, film, order, told, caching):
    media, heard = {"film": film, "picture": picture()}, []
    one = Engine(engine.model, engine.processor, caching)
    for _ in range(2):
        heard.clear()
        medium = [media[name] for name in order.split()]
        list(one.stream("what?", medium, num_frames=10, max_tokens=1, progress=lambda *n: heard.append(n)))
        assert heard[-len(told) :] == told


def test_the_models_stop_ids_end_an_answer():
    engine = tiny_engine()
    tokens = engine.processor.tokenizer("a", add_special_tokens=False)["input_ids"]
    engine.model.generation_config.eos_token_id = list(range(5, 261))
    stats = engine.ask("what?", picture(), max_tokens=5).stats
    assert tokens[0] in engine.model.generation_config.eos_token_id
    assert (stats.answer_tokens, stats.finish_reason) == (1, "stop")


def test_a_closed_stream_is_unfinished_and_the_engine_goes_on(engine):
    stream = engine.stream("what?", picture(), max_tokens=300)
    first = next(stream)
    stream.close()
    assert stream.text == first
    assert stream.stats.finish_reason == ""
    assert engine.ask("what?", picture(), max_tokens=300).text.startswith(first)


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths_and_what_to_do():
    engine = tiny_engine(max_position_embeddings=64)
    text = engine.processor.prompt_length([user(("video", "x"), "what?")])
    with pytest.raises(ValueError, match=r"fewer frames") as refusal:
        engine.ask("what?", iter([picture()] * 100))
    fitting = 63 - text
    assert f"at least {text + 8 * (fitting // 8 + 1)} tokens" in str(refusal.value)
    assert "context holds 64" in str(refusal.value)
    assert f"--frames {fitting} on the command line, num_frames={fitting} in Python" in str(refusal.value)
    assert engine.ask("what?", np.stack([picture()] * fitting), max_tokens=1).stats.answer_tokens == 1


def test_a_film_too_long_for_the_context_is_not_read_to_its_end():
    made = []

    def frames():
        for index in range(10_000):
            made.append(index)
            yield picture()

    with pytest.raises(ValueError, match="context"):
        tiny_engine(max_position_embeddings=64).ask("what?", frames())
    assert len(made) < 64 + 8


def test_a_question_beyond_the_context_is_refused_before_any_frame_is_read():
    def frames():
        raise AssertionError("a frame was read")
        yield

    with pytest.raises(ValueError, match=r"context holds 64.*shorten the question"):
        tiny_engine(max_position_embeddings=64).ask("what? " * 20, frames())


def test_max_tokens_is_cut_to_what_the_context_has_left():
    engine = tiny_engine(max_position_embeddings=64)
    with pytest.warns(UserWarning, match=r"max_tokens is cut from 512 to \d+") as warned:
        stats = engine.ask("what?", picture()).stats
    room = 64 - stats.text_tokens - stats.vision_tokens
    assert f"to {room}:" in str(warned[0].message)
    assert stats.answer_tokens == room


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -0.1}, "temperature must be 0 or a positive number"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number"),
        ({"num_frames": 2, "all_frames": True}, "exclude one another"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"fps": -1.0}, r"fps is -1\.0"),
    ],
)
def test_impossible_settings_are_refused(engine, choice, message):
    with pytest.raises(ValueError, match=message):
        engine.ask("what?", picture(), **choice)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(engine, question):
    with pytest.raises(ValueError, match="question is empty"):
        engine.ask(question, picture())


def test_a_conversation_is_answered_from_all_of_its_turns(engine, film):
    conversation = engine.chat(film, AnswerSettings(max_tokens=12))
    first = "".join(conversation.say("what?"))
    assert first == plain_answer(engine, [user(("video", film), "what?")])
    conversation.add(picture())
    second = "".join(conversation.say("and now?"))
    said = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    turns = [user(("video", film), "what?"), said, user(("image", picture()), "and now?")]
    assert second == plain_answer(engine, turns)
    assert conversation.stats.frames == 4
    conversation.reset()
    assert "".join(conversation.say("what?")) == first


def test_a_model_is_loaded_in_float32_when_it_is_small(folder):
    engine = Engine.load(str(folder), device="cpu")
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float32}
    assert not engine.model.training
    assert engine.ask("what?", picture(), max_tokens=8).text == tiny_engine().ask("what?", picture(), max_tokens=8).text


def test_a_chosen_number_format_is_the_models(folder):
    engine = Engine.load(str(folder), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.bfloat16}
    assert engine.ask("what?", picture(), max_tokens=3).stats.answer_tokens == 3


def test_8_bit_weights_are_the_language_models_and_the_rest_keeps_16_bits(folder):
    engine = Engine.load(str(folder), device="cpu", dtype="bfloat16", quantization="int8")
    kinds = {name: type(parameter).__name__ for name, parameter in engine.model.named_parameters()}
    eight_bit = {name for name, kind in kinds.items() if kind == "Int8Tensor"}
    assert eight_bit == {name for name in kinds if "language_model.model.layers" in name and "proj" in name}
    assert len(eight_bit) == 3 * 7
    assert {p.dtype for n, p in engine.model.named_parameters() if n not in eight_bit} == {torch.bfloat16}
    assert engine.ask("what?", picture(), max_tokens=3).stats.answer_tokens == 3


def test_8_bit_answers_stay_close(folder):
    plain, small = (Engine.load(str(folder), "cpu", "float32", kind) for kind in (None, "int8"))
    messages = [user(("image", picture()), "what?")]
    inputs = plain.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        exact, close = (engine.model(**inputs).logits for engine in (plain, small))
    assert not torch.equal(exact, close)
    assert (exact - close).norm() < 0.05 * exact.norm()


def test_a_model_that_cannot_fit_is_refused_before_its_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda device: 10_000)
    monkeypatch.setattr(loading.LlavaMiniForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(ValueError, match=r"needs about .* MB .* on cpu in float32, but 0\.0 MB are free") as refusal:
        Engine.load(str(folder), device="cpu")
    for option in ("dtype bfloat16", "quantization int8", "another device", "a smaller model"):
        assert option in str(refusal.value)


def test_little_memory_means_fewer_frames_at_a_time_and_the_same_answer(folder, monkeypatch):
    monkeypatch.setattr(memory, "PROMPT_TOKENS", 8)
    config = loading.read_config(str(folder))
    need = loading.memory_need(loading.meta_model(config), torch.float32, frames=2).total
    monkeypatch.setattr(loading, "available_memory", lambda device: need)
    engine = Engine.load(str(folder), device="cpu")
    assert engine.model.frames_per_pass == 2
    film = np.stack([picture(index) for index in range(9)])
    assert engine.ask("what?", film, max_tokens=8).text == tiny_engine().ask("what?", film, max_tokens=8).text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nothing"}, "There is no model 'nothing'"),
        ({"device": "gpu"}, "There is no device 'gpu'"),
        ({"dtype": "int4"}, "There is no dtype 'int4'"),
        ({"quantization": "int3"}, "There is no quantization 'int3'"),
    ],
)
def test_unknown_names_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        Engine.load(**{"model": str(folder), **arguments})


def test_a_folder_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json"):
        Engine.load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"of type 'llama', not a LLaVA-Mini.*llava-mini convert"):
        Engine.load(str(tmp_path))
