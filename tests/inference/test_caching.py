"""Answers of an engine that keeps things are those of one that keeps nothing, and never those about another picture."""

import itertools
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini.inference import frame_reader
from llava_mini.inference.engine import Engine
from llava_mini.inference.media import assistant_message, media_parts, user_message
from llava_mini.inference.settings import NO_CACHING, AnswerSettings, Caching, Request
from llava_mini.inference.stats import Stats
from tests.tiny_engine import picture, tiny_parts, write_film

LENGTH = 6


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = write_film(tmp_path_factory.mktemp("film") / "film.mp4")
    os.utime(path, (1, 1))
    return path


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Trust time stamps at once, so that tests need not wait for files to settle."""
    monkeypatch.setattr(frame_reader, "_SETTLED_NS", -1)


def text(engine, question, media, **settings):
    return engine.ask(question, media, max_tokens=LENGTH, **settings).text


@pytest.mark.parametrize(
    "caching",
    [
        Caching(),
        Caching(kept="features"),
        Caching(frame_bytes=0),
        Caching(prompt_bytes=0),
        Caching(frame_bytes=30_000),
    ],
    ids=["both", "features", "prompts alone", "frames alone", "small budget"],
)
def test_answers_are_those_of_an_engine_that_keeps_nothing(parts, film, caching):
    engine, plain = Engine(*parts, caching), Engine(*parts, NO_CACHING)
    media = [[picture(1)], [film], [picture(1), film], [film, picture(1)], []]
    for question, some in itertools.product(("One?", "What is this?", "One?"), media):
        assert text(engine, question, some) == text(plain, question, some)
    assert plain.frames.stats.hit_rate == 0


def test_a_later_question_runs_neither_the_vision_tower_nor_the_tokens_before_it(parts, film, monkeypatch):
    engine = Engine(*parts)
    first = engine.ask("One?", [film], max_tokens=LENGTH).stats
    assert (first.cached_frames, first.cached_tokens) == (0, 0)
    monkeypatch.setattr(type(engine.model), "encode_frames", None)
    monkeypatch.setattr(type(engine._reader), "_decoded", None)
    later = engine.ask("Two?", [film], max_tokens=LENGTH).stats
    assert later.cached_frames == later.frames == 3
    assert later.cached_tokens > later.vision_tokens


@pytest.mark.parametrize(("kept", "again"), [("keys_values", []), ("features", ["reduction"])])
def test_the_seconds_of_a_later_question_hold_the_cache_and_what_is_made_again(parts, film, tmp_path, kept, again):
    engine = Engine(*parts, Caching(frame_bytes=0, folder=tmp_path, kept=kept))
    engine.ask("One?", [film], max_tokens=2)
    seconds = engine.ask("Two?", [film], max_tokens=2).stats.seconds
    measured = [part for part, time in seconds.items() if time > 0]
    assert measured == ["media", *again, "prefusion", "prefill", "generation"]


def test_a_picture_in_memory_is_known_by_its_pixels(parts):
    engine = Engine(*parts)
    engine.ask("One?", [picture(2)], max_tokens=1)
    assert engine.ask("Two?", [picture(2)], max_tokens=1).stats.cached_frames == 1
    assert engine.ask("Two?", [picture(3)], max_tokens=1).stats.cached_frames == 0


def other_pictures(tmp_path):
    """Pictures of one size that are easily taken for one another."""
    base = picture(5, (16, 16))
    pixels = np.asarray(base).copy()
    pixels[3, 4, 1] ^= 16
    last = np.asarray(base).copy()
    last[-1, -1, -1] ^= 128
    base.save(tmp_path / "a.jpg", quality=90)
    base.save(tmp_path / "b.jpg", quality=60)
    return {
        "base": base,
        "rotated": base.transpose(Image.Transpose.ROTATE_180),
        "mirrored": base.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "one value of one pixel": Image.fromarray(pixels),
        "the last value of all": Image.fromarray(last),
        "re-encoded": tmp_path / "a.jpg",
        "re-encoded again": tmp_path / "b.jpg",
        "other proportions": base.resize((8, 32)),
    }


def test_no_picture_gets_the_answer_about_another(parts, tmp_path):
    plain = Engine(*parts, NO_CACHING)
    media = other_pictures(tmp_path)
    logits = {name: prefill(plain, [one]) for name, one in media.items()}
    for caching in (Caching(), Caching(folder=tmp_path / "cache"), Caching(kept="features")):
        engine = Engine(*parts, caching)
        for _ in range(2):
            for name, one in media.items():
                torch.testing.assert_close(prefill(engine, [one]), logits[name], atol=1e-4, rtol=1e-3)
    different = torch.stack([*logits.values()])
    distances = (different[:, None] - different[None]).abs().amax(-1) + torch.eye(len(media))
    assert distances.min() > 1e-4  # so that a mistake would show


def prefill(engine, media, question="What?"):
    """What the language model says at the last position of the prompt, through the caches: [D]."""
    (prompt,) = engine._fuse([[user_message(question, media_parts(media))]], AnswerSettings(), None, [Stats()])
    cache = engine.prompts.take(prompt.key)
    embeds = prompt.fused.inputs_embeds[:, cache.get_seq_length() :]
    with torch.inference_mode():
        logits = engine.model.language_model(inputs_embeds=embeds, past_key_values=cache).logits[0, -1]
    engine.prompts.put(prompt.key, cache)
    return logits


def test_the_order_and_the_number_of_pictures_count(parts):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    one, two = picture(1), picture(2)
    for media in ([one, two], [two, one], [one], [one, one], [two], [one, two]):
        torch.testing.assert_close(prefill(engine, media), prefill(plain, media), atol=1e-4, rtol=1e-3)


def test_a_file_that_was_overwritten_is_another_file(parts, tmp_path):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    path = tmp_path / "film.avi"
    films = [write_film(tmp_path / f"{seconds}.avi", seconds=seconds) for seconds in (2, 3)]
    for film in (*films, films[0]):
        shutil.copyfile(film, path)
        os.utime(path, (5, 5))  # the same time stamp each time
        torch.testing.assert_close(prefill(engine, [path]), prefill(plain, [path]), atol=1e-4, rtol=1e-3)


def test_a_file_that_was_overwritten_with_as_many_bytes_is_another_file(parts, tmp_path):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    path = tmp_path / "picture.bmp"
    for number in (1, 2, 3):
        picture(number).save(path)
        os.utime(path, (5, 5))
        torch.testing.assert_close(prefill(engine, [path]), prefill(plain, [path]), atol=1e-4, rtol=1e-3)


def test_a_file_that_changed_a_moment_ago_is_read_again(parts, film, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_reader, "_SETTLED_NS", 2_000_000_000)
    path = tmp_path / "film.mp4"
    shutil.copyfile(film, path)
    engine = Engine(*parts)
    engine.ask("One?", [path], max_tokens=1)
    assert engine._reader._pixels_of_file == {}


def test_other_frames_of_the_same_film_are_other_frames(parts, film):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    for choice in ({"num_frames": 2}, {"num_frames": 5}, {"fps": 2}, {"all_frames": True}, {"num_frames": 2}):
        assert text(engine, "One?", [film], **choice) == text(plain, "One?", [film], **choice)


def test_other_preprocessing_makes_other_frames(parts, film, tmp_path):
    model, processor = parts
    for frame_resize in ("image_mode", "nearest", "image_mode"):
        processor.frame_resize = frame_resize
        engine = Engine(model, processor, Caching(folder=tmp_path))
        torch.testing.assert_close(
            prefill(engine, [film]), prefill(Engine(model, processor, NO_CACHING), [film]), atol=1e-4, rtol=1e-3
        )
    processor.frame_resize = "image_mode"


@pytest.mark.parametrize("part", ["vision_tower", "projector", "prefusion", "language_model"])
def test_changed_weights_make_everything_anew(part, film):
    model, processor = tiny_parts(seed=3)
    engine = Engine(model, processor)
    before = prefill(engine, [film])
    with torch.no_grad():
        weight = max(getattr(model, part).parameters(), key=torch.numel)
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    after = prefill(engine, [film])
    torch.testing.assert_close(after, prefill(Engine(model, processor, NO_CACHING), [film]), atol=1e-4, rtol=1e-3)
    assert (after - before).abs().max() > 1e-3


def test_models_may_share_a_folder(film, tmp_path):
    for seed in (0, 1, 0):
        engine = Engine(*tiny_parts(seed), Caching(folder=tmp_path))
        plain = Engine(*tiny_parts(seed), NO_CACHING)
        torch.testing.assert_close(prefill(engine, [film]), prefill(plain, [film]), atol=1e-4, rtol=1e-3)


def test_a_folder_serves_the_next_process(parts, film, tmp_path):
    Engine(*parts, Caching(folder=tmp_path)).ask("One?", [film], max_tokens=1)
    again = Engine(*parts, Caching(folder=tmp_path))
    answer = again.ask("Two?", [film], max_tokens=LENGTH)
    assert answer.stats.cached_frames == 3
    assert again.frames.stats.hits_on_disk == 3
    assert answer.text == text(Engine(*parts, NO_CACHING), "Two?", [film])


def test_frames_whose_files_were_damaged_are_made_anew(parts, film, tmp_path):
    engine = Engine(*parts, Caching(frame_bytes=0, folder=tmp_path))
    expected = prefill(engine, [film])
    for path in sorted(tmp_path.rglob("*.safetensors"))[:2]:
        path.write_bytes(b"damaged")
    engine.prompts.clear()
    with pytest.warns(UserWarning, match="is not what this cache wrote"):
        torch.testing.assert_close(prefill(engine, [film]), expected, atol=1e-4, rtol=1e-3)


def test_the_same_picture_in_a_chunk_is_seen_once(parts):
    engine, frames = Engine(*parts), [picture(1), picture(2), picture(1), picture(1)]
    answer = engine.ask("One?", iter(frames), max_tokens=LENGTH)
    assert (answer.stats.frames, answer.stats.cached_frames) == (4, 2)
    assert answer.text == text(Engine(*parts, NO_CACHING), "One?", iter(frames))


def test_several_questions_get_the_answers_they_get_alone(parts, film):
    questions = ["One?", "What is this, and why is it here?", "Two?"]
    for media in ([film], [picture(3), film], []):
        plain = Engine(*parts, NO_CACHING)
        answers = Engine(*parts).ask_all(questions, media, max_tokens=LENGTH)
        assert [str(answer) for answer in answers] == [text(plain, question, media) for question in questions]
        for answer, question in zip(answers, questions, strict=True):
            alone = plain.ask(question, media, max_tokens=LENGTH).stats
            assert (answer.stats.text_tokens, answer.stats.frames) == (alone.text_tokens, alone.frames)


def test_several_questions_share_one_look(parts, film, monkeypatch):
    engine, seen = Engine(*parts), []
    encode = type(engine.model).encode_frames

    def counted(model, pixels):
        seen.append(len(pixels))
        return encode(model, pixels)

    monkeypatch.setattr(type(engine.model), "encode_frames", counted)
    answers = engine.ask_all(["One?", "Two?", "Three?"], [film], max_tokens=2)
    assert sum(seen) == 3
    assert answers[1].stats.cached_tokens > answers[1].stats.vision_tokens


def test_a_batch_about_different_media_gets_the_answers_that_its_requests_get_alone(parts, film):
    plain = Engine(*parts, NO_CACHING)
    requests = [
        Request(question="One?", media=[film]),
        Request(question="What is this, and why is it here?", media=[picture(1), picture(2)]),
        Request(question="And this?"),
        Request(question="What is this, and why is it here?", media=[picture(2), picture(1)]),
        Request(question="Two?", media=[film]),
    ]
    answers = Engine(*parts).ask_batch(requests, max_tokens=LENGTH)
    for request, answer in zip(requests, answers, strict=True):
        alone = plain.ask(request.question, request.media, max_tokens=LENGTH)
        assert answer.text == alone.text
        assert (answer.stats.frames, answer.stats.answer_tokens) == (alone.stats.frames, alone.stats.answer_tokens)
        assert answer.stats.finish_reason == alone.stats.finish_reason
    assert answers[4].stats.cached_frames == 3
    for wrong in ([], ["One?"]):
        with pytest.raises(ValueError, match="at least one, each a Request"):
            plain.ask_batch(wrong)


@pytest.mark.parametrize("questions", [[], "One?", ["One?", " "]])
def test_impossible_lists_of_questions_are_refused(parts, questions):
    with pytest.raises(ValueError, match="list of questions|question"):
        Engine(*parts).ask_all(questions, [picture()])


@pytest.mark.parametrize("fuse_answers", [False, True])
def test_a_conversation_goes_on_from_what_was_said(film, fuse_answers):
    model, processor = tiny_parts()
    model.config.fuse_answers = fuse_answers
    engine, plain = Engine(model, processor), Engine(model, processor, NO_CACHING)
    settings, messages, reused = AnswerSettings(max_tokens=LENGTH), [], []
    for question in ("One?", "Two?", "And three?"):
        messages.append(user_message(question, media_parts([film]) if not messages else []))
        streams = [one.stream_messages(messages, settings) for one in (engine, plain)]
        answers = ["".join(stream) for stream in streams]
        assert answers[0] == answers[1]
        reused.append(streams[0].stats.cached_tokens)
        messages.append(assistant_message(answers[0]))
    assert reused[0] == 0
    assert reused[1] > 3
    assert reused[2] > reused[1] or fuse_answers  # an answer that is fused later changes what comes after it


def test_a_stream_that_is_closed_leaves_keys_and_values_that_fit(parts):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    for stop_after in (1, 2, 3):
        with engine.stream("One?", [picture(1)], max_tokens=20) as stream:
            for _ in range(stop_after):
                next(stream)
        assert text(engine, "One?", [picture(1)]) == text(plain, "One?", [picture(1)])


def test_long_prompts_are_read_in_pieces(parts, monkeypatch):
    expected = text(Engine(*parts, NO_CACHING), "What is this?", [picture(1)])
    monkeypatch.setattr("llava_mini.inference.torch_backend.PREFILL_TOKENS", 5)
    assert text(Engine(*parts, NO_CACHING), "What is this?", [picture(1)]) == expected


def test_only_the_latest_files_are_remembered(parts, film, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_reader, "_MOST_FILES", 2)
    files = [shutil.copy2(film, tmp_path / f"{number}.mp4") for number in range(3)]
    engine = Engine(*parts)
    for file in [files[0], files[1], files[0], files[2]]:
        text(engine, "One?", [file])
    assert [key[0] for key in engine._reader._pixels_of_file] == [str(files[0]), str(files[2])]


def test_an_interrupted_film_leaves_no_thread_and_the_engine_goes_on(parts, film):
    engine = Engine(*parts)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(engine.stream("One?", [film], all_frames=True, max_tokens=1, progress=interrupt))
    deadline = time.monotonic() + 5
    while any(thread.name == "llava-mini media" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert text(engine, "One?", [film]) == text(Engine(*parts, NO_CACHING), "One?", [film])


def test_a_file_in_the_place_of_the_folder_is_refused(parts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot live in"):
        Engine(*parts, Caching(folder=tmp_path / "file"))


def test_an_animated_picture_as_an_image_is_not_the_same_as_a_video(parts, tmp_path):
    path = tmp_path / "moving.gif"
    frames = [picture(number, (16, 16)) for number in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=500)
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    for kinds in (["image"], ["video"], ["image"], ["video", "image"], ["image", "video"]):
        media = [{"type": kind, kind: path} for kind in kinds]
        torch.testing.assert_close(prefill(engine, media), prefill(plain, media), atol=1e-4, rtol=1e-3)


def scaled_through_data(model):
    model.projector.linear_1.weight.data.mul_(1.5)


def replaced_module(model):
    model.projector = type(model.projector)(model.config.vision.hidden_size, model.config.text.hidden_size).eval()


def replaced_language_model(model):
    model.language_model = tiny_parts(seed=9)[0].language_model


def another_configuration(model):
    model.config.vision_tokens_from = "reducer"


@pytest.mark.parametrize(
    "change", [scaled_through_data, replaced_module, replaced_language_model, another_configuration]
)
@pytest.mark.parametrize("folder", [False, True])
def test_changes_that_leave_no_version_are_noticed(change, film, folder, tmp_path):
    torch.manual_seed(0)
    model, processor = tiny_parts(seed=4)
    engine = Engine(model, processor, Caching(folder=tmp_path if folder else None))
    before = prefill(engine, [film])
    change(model)
    after = prefill(engine, [film])
    torch.testing.assert_close(after, prefill(Engine(model, processor, NO_CACHING), [film]), atol=1e-4, rtol=1e-3)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("targets", [r"prefusion\..*q_proj", r"language_model\..*q_proj"])
def test_adapters_that_are_switched_are_noticed(targets, film, tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = tiny_parts(seed=5)
    model.add_adapter(peft.LoraConfig(target_modules=rf".*{targets}", r=2, init_lora_weights=False))
    engine = Engine(model, processor, Caching(folder=tmp_path))
    for switch in (lambda: None, model.disable_adapters, model.enable_adapters):
        switch()
        plain = Engine(model, processor, NO_CACHING)
        torch.testing.assert_close(prefill(engine, [film]), prefill(plain, [film]), atol=1e-4, rtol=1e-3)


def test_kernels_do_not_share_what_they_kept(film):
    model, processor = tiny_parts()
    engine = Engine(model, processor)
    engine.ask("One?", [film], max_tokens=1)
    model.set_attn_implementation("eager")
    stats = engine.ask("One?", [film], max_tokens=1).stats
    assert (stats.cached_frames, stats.cached_tokens) == (0, 0)


def test_a_flipped_bit_in_a_file_is_noticed(parts, film, tmp_path):
    expected = prefill(Engine(*parts, Caching(folder=tmp_path)), [film])
    for path in tmp_path.rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 64
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="checksum"):
        torch.testing.assert_close(
            prefill(Engine(*parts, Caching(folder=tmp_path)), [film]), expected, atol=1e-4, rtol=1e-3
        )


def test_an_answer_comes_when_the_folder_cannot_be_written(parts, film, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left")

    engine = Engine(*parts, Caching(folder=tmp_path / "cache"))
    monkeypatch.setattr("llava_mini.inference.tensor_cache.save_file", fail)
    with pytest.warns(UserWarning, match="cannot write") as told:
        assert text(engine, "One?", [film]) == text(Engine(*parts, NO_CACHING), "One?", [film])
    assert len([one for one in told if "cannot write" in str(one.message)]) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_question_in_between_leaves_a_conversation_what_it_kept(parts):
    engine, settings = Engine(*parts), AnswerSettings(max_tokens=20)
    messages = [user_message("What is this, and why is it here, of all places?", media_parts([picture(1)]))]
    messages.append(assistant_message("".join(engine.stream_messages(messages, settings))))
    engine.ask("One?", [picture(1)], max_tokens=1)
    stream = engine.stream_messages([*messages, user_message("And?", [])], settings)
    list(stream)
    assert stream.stats.cached_tokens > 40


def test_a_prompt_over_the_budget_does_not_push_out_the_others(parts, film):
    engine = Engine(*parts, Caching(prompt_bytes=40_000))
    engine.ask("One?", [picture(1)], max_tokens=1)
    kept = engine.prompts.num_bytes
    engine.ask("One?" * 30, [picture(2)], max_tokens=1)
    assert engine.prompts.num_bytes == kept > 0


def test_an_engine_keeps_its_model(parts):
    with pytest.raises(AttributeError):
        Engine(*parts).model = parts[0]


@pytest.mark.parametrize("wrong", [{"kept": "feature"}, {"folder": 5}, {"frame_bytes": -1}, {"prompt_bytes": -1}])
def test_impossible_caching_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Caching(**wrong)
