"""An engine that is asked from several threads at once gives each its own answer."""

from concurrent.futures import ThreadPoolExecutor

from llava_mini.inference.engine import Engine
from llava_mini.inference.settings import NO_CACHING, AnswerSettings, Request
from tests.tiny_engine import picture

LENGTH = 6
THREADS = 4


def text(engine, question, media):
    return engine.ask(question, media, max_tokens=LENGTH).text


def at_once(ask, things):
    """What ``ask`` says of all things, in several threads; its errors come out here."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, things))


def test_questions_from_several_threads_get_their_own_answers(parts):
    engine, plain = Engine(*parts), Engine(*parts, NO_CACHING)
    media = [picture(number % 4) for number in range(18)]
    expected = [text(plain, "One?", [one]) for one in media]
    assert at_once(lambda one: text(engine, "One?", [one]), media) == expected


def test_lists_batches_and_conversations_from_several_threads_get_their_own_answers(parts):
    engine, plain, numbers = Engine(*parts), Engine(*parts, NO_CACHING), range(8)

    def answers(engine, number):
        one = picture(number % 3)
        of_all = engine.ask_all(["One?", "Two?"], [one], max_tokens=LENGTH)
        requests = [Request(question="One?", media=[one]), Request(question="And this?")]
        conversation = engine.chat([one], AnswerSettings(max_tokens=LENGTH))
        turns = ["".join(conversation.say(question)) for question in ("One?", "Why?")]
        return [*map(str, of_all), *map(str, engine.ask_batch(requests, max_tokens=LENGTH)), *turns]

    assert at_once(lambda number: answers(engine, number), numbers) == [answers(plain, number) for number in numbers]


def test_engines_may_share_a_model_and_be_asked_at_once(parts):
    engines = [Engine(*parts), Engine(*parts, NO_CACHING)]
    expected = text(Engine(*parts, NO_CACHING), "One?", [picture(7)])
    found = at_once(lambda engine: text(engine, "One?", [picture(7)]), engines * 16)
    assert found == [expected] * len(found)


def test_frames_may_come_from_somebody_who_asks_the_same_engine(parts):
    engine = Engine(*parts)

    def frames():
        for number in range(3):
            engine.ask("And this?", [picture(number)], max_tokens=1)
            yield picture(number)

    assert engine.ask("One?", iter(frames()), max_tokens=LENGTH).stats.frames == 3
