"""A watched stream is answered as the same frames in a film are, in memory that does not grow."""

import gc
import itertools
import socket
import threading
import time

import pytest
import torch

from llava_mini.inference.engine import Engine
from llava_mini.inference.settings import NO_CACHING, Caching
from llava_mini.inference.video_stream import LiveSource
from tests.inference.rtsp_server import RtspServer
from tests.tiny_engine import write_film

LENGTH = 5


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", seconds=10, rate=4)


def pictures(film, fps=2.0):
    with LiveSource(film, fps=fps, waiting=1000, speed=1000) as source:
        return [frame.image for frame in itertools.chain.from_iterable(iter(source.take, []))]


def test_frames_of_a_file_come_in_its_own_time(film):
    began = time.monotonic()
    with LiveSource(film, fps=1, speed=20, waiting=100) as source:
        frames = list(itertools.chain.from_iterable(iter(source.take, [])))
    assert [round(frame.time, 3) for frame in frames] == list(range(10))
    assert time.monotonic() - began >= 9 / 20
    assert source.dropped == 0


def test_the_oldest_frames_are_dropped_and_counted_when_nobody_looks(film):
    with LiveSource(film, fps=4, speed=200, waiting=3) as source:
        while source.dropped < 37:
            time.sleep(0.01)
        frames = source.take()
    assert [frame.time for frame in frames] == [9.25, 9.5, 9.75]
    assert source.take() == []


def test_leaving_a_source_early_ends_its_thread(film):
    with LiveSource(film, fps=4) as source:
        source.take()
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert not any(thread.name == "llava-mini stream" for thread in threading.enumerate())


@pytest.mark.parametrize("memory", ["standing", "window", "all", "all on disk"])
def test_answers_at_any_moment_are_those_about_the_frames_so_far(parts, film, memory, tmp_path):
    caching = Caching(frame_bytes=0, folder=tmp_path) if memory == "all on disk" else None
    engine, plain = Engine(*parts, caching), Engine(*parts, NO_CACHING)
    images, window = pictures(film), 18 if memory == "window" else None  # more than one pass
    standing = "What is it?" if memory == "standing" else None
    watch = engine.watch(film, question=standing, window=window, fps=2, speed=100, waiting=100, max_tokens=LENGTH)
    asked = 0
    with watch:
        for moment in watch:
            assert moment.dropped == 0
            for question in ("What is it?",) if standing else ("What is it?", "And now?"):
                stream = watch.ask(None if standing else question)
                answer = "".join(stream)
                seen = images[: moment.frames][-window if window else 0 :]
                assert answer == plain.ask(question, [{"type": "video", "video": seen}], max_tokens=LENGTH).text
                assert stream.stats.frames == stream.stats.cached_frames == len(seen)
                measured = {part for part, seconds in stream.stats.seconds.items() if seconds > 0}
                from_cache = {"media"} if memory.startswith("all") else set()
                assert measured == {"prefusion", "prefill", "generation"} | from_cache
                asked += 1
    assert watch.moment.frames == len(images) == 20
    assert watch.moment.time == 9.5
    assert asked > 1


def bytes_of_tensors():
    """What all tensors of this process hold. Those of 8 bits are made of others and hold nothing themselves."""
    tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    storages = (one.untyped_storage() for one in tensors if not hasattr(type(one), "__tensor_flatten__"))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_an_hour_is_watched_in_flat_memory(parts, tmp_path):
    hour = write_film(tmp_path / "hour.avi", seconds=3600, rate=1)
    engine, held = Engine(*parts), []
    with engine.watch(hour, window=16, speed=3600, waiting=4000, max_tokens=2) as watch:
        for moment in watch:
            assert len(watch._kept) <= 16
            if moment.frames > 1000 * len(held):
                held.append(bytes_of_tensors())
    assert len(held) == 4
    assert held[3] < held[0] + 2e5
    assert watch.moment.frames == 3600
    assert watch.moment.time == 3599
    assert watch.ask("What?").stats.frames == 16
    with engine.watch(hour, question="What?", speed=3600, waiting=4000, max_tokens=2) as watch:
        for _ in watch:
            assert watch._fusion.length < engine.model.config.text.max_position_embeddings
    assert watch.began_anew > 5  # the context holds 512 tokens
    stream = watch.ask()
    list(stream)
    assert 0 < stream.stats.frames < 512
    assert len(engine.frames) == 0


def test_a_camera_on_the_network_is_watched_and_found_again(parts):
    with RtspServer() as server:
        watch = Engine(*parts).watch(server.address, window=5, fps=10, max_tokens=2)
        with watch:
            for moment in watch:
                if moment.frames > 3 and watch._source.reconnects == 0:
                    server.hang_up()
                if watch._source.reconnects == 1:
                    break
        frames = watch.moment.frames
        assert frames > 3
        assert "".join(watch.ask("What?"))


def test_a_stream_that_is_not_there_is_told_in_one_sentence(parts):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"rtsp://127.0.0.1:{unused.getsockname()[1]}/camera"
    watch = Engine(*parts).watch(address, window=5)
    with pytest.raises(ValueError, match=r"gives no picture .* Check the address"), watch:
        next(watch)


def test_a_file_without_pictures_is_told_in_one_sentence(parts, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    watch = Engine(*parts).watch(tmp_path / "noise.mp4", window=5)
    with pytest.raises(ValueError, match="neither an image nor a video"), watch:
        next(watch)


def test_impossible_watches_are_refused(parts, film):
    engine = Engine(*parts)
    for choice, message in (
        ({"question": "What?", "window": 3}, "without a window"),
        ({"window": 0}, "at least one frame, got 0"),
        ({"fps": 0}, "fps must be a positive number"),
        ({"speed": float("nan")}, "speed must be a positive number"),
        ({"waiting": 0}, "waiting=0"),
        ({"question": " "}, "question"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.watch(film, **choice)
    with pytest.raises(ValueError, match="is live"):
        engine.watch("rtsp://127.0.0.1/x", window=3, speed=2)
    with pytest.raises(ValueError, match="no file"):
        engine.watch("nowhere.mp4", window=3)


def test_questions_that_a_watch_cannot_answer_are_refused(parts, film):
    engine = Engine(*parts)
    standing = engine.watch(film, question="What?", speed=100)
    with pytest.raises(ValueError, match="Nothing was seen yet"):
        standing.ask()
    with standing:
        next(standing)
    with pytest.raises(ValueError, match="standing question 'What\\?' and can answer no other"):
        standing.ask("Where?")
    with pytest.raises(ValueError, match="say what to ask"):
        engine.watch(film, window=2).ask()


def test_frames_that_left_the_cache_are_told_of(parts, film):
    engine = Engine(*parts, Caching(frame_bytes=10_000))
    with engine.watch(film, fps=4, speed=1000, waiting=100) as watch:
        for _ in watch:
            pass
    with pytest.raises(ValueError, match="no longer in the cache"):
        list(watch.ask("What?"))


def test_a_watch_may_be_asked_from_another_thread(parts, film):
    for standing in ("What?", None):
        watch = Engine(*parts).watch(
            film, question=standing, window=None if standing else 3, fps=4, speed=30, max_tokens=1, waiting=100
        )
        errors, done = [], threading.Event()

        def ask(watch=watch, standing=standing, errors=errors, done=done):
            while not done.is_set():
                try:
                    list(watch.ask(None if standing else "What?"))
                except ValueError as error:
                    if "Nothing was seen" not in str(error):
                        errors.append(error)
                except Exception as error:
                    errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        with watch:
            for _ in watch:
                pass
        done.set()
        thread.join()
        assert not errors


def test_streams_are_read_in_a_with_statement_and_once(film):
    source = LiveSource(film, speed=1000)
    with pytest.raises(ValueError, match="with statement"):
        source.take()
    with source:
        source.take()
    with pytest.raises(ValueError, match="read before"), source:
        pass


def test_more_frames_than_the_context_holds_are_refused(parts, film):
    engine = Engine(*parts)
    with pytest.raises(ValueError, match=r"window of at most \d+ frames"):
        engine.watch(film, window=600)
    with pytest.raises(ValueError, match="keeps none"):
        Engine(*parts, NO_CACHING).watch(film)
