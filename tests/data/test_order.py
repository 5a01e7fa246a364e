import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from llava_mini.data.order import BatchOrder
from llava_mini.data.samples import KINDS

TEXT, IMAGE, _, VIDEO = range(4)


def outlined(*files, weights=None, seed=0):
    """Files are the kinds of their samples."""
    kinds = np.concatenate([np.array(file, dtype=np.int8) for file in files])
    lengths = np.random.default_rng(seed).integers(10, 5000, len(kinds))
    first = np.cumsum([0, *(len(file) for file in files)])
    return SimpleNamespace(kinds=kinds, lengths=lengths, first=first, weights=weights or (1.0,) * len(files))


MIXED = outlined([IMAGE] * 60 + [TEXT] * 25, [VIDEO] * 17 + [IMAGE] * 20)


def order(samples=MIXED, **settings):
    return BatchOrder(samples, **{"batch_size": 4, "seed": 1, **settings})


def epoch(batches, number=0):
    start = number * batches.num_batches
    return [batches.batches(index) for index in range(start, start + batches.num_batches)]


def seen(batches, number=0):
    return Counter(sample for batch in epoch(batches, number) for sample in batch)


@pytest.mark.parametrize("alike", [1, 3, 8, 200])
def test_an_epoch_has_each_sample_once(alike):
    for number in range(3):
        assert seen(order(alike=alike), number) == dict.fromkeys(range(122), 1)
    assert order(alike=alike).num_samples == 122


def test_a_micro_batch_has_one_kind_and_its_size():
    sizes = {"text": 8, "image": 4, "multi-image": 4, "video": 1}
    for batch in epoch(order(batch_size=sizes)):
        (kind,) = {KINDS[MIXED.kinds[sample]] for sample in batch}
        assert 1 <= len(batch) <= sizes[kind]


def test_micro_batches_of_a_kind_are_as_few_as_hold_the_samples_and_of_one_size_but_one():
    sizes = [len(batch) for batch in epoch(order()) if MIXED.kinds[batch[0]] == TEXT]
    assert sorted(sizes) == [3, 3, 3, 4, 4, 4, 4]


def test_each_epoch_has_an_order_of_its_own_and_each_seed_too():
    batches = order()
    assert epoch(batches, 0) != epoch(batches, 1)
    together = [{frozenset(batch) for batch in epoch(batches, number) if len(batch) > 1} for number in (0, 1)]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])
    assert epoch(batches) != epoch(order(seed=2))


def test_a_micro_batch_depends_on_its_number_alone():
    batches = order()
    forwards = [batches.batches(index) for index in range(100)]
    fresh = order()
    assert [fresh.batches(index) for index in reversed(range(100))] == forwards[::-1]
    assert [pickle.loads(pickle.dumps(batches)).batches(index) for index in (99, 3)] == [forwards[99], forwards[3]]


def test_what_was_worked_out_does_not_travel():
    batches = order(outlined([IMAGE] * 5000))
    before = len(pickle.dumps(batches))
    batches.batches(0)
    assert len(pickle.dumps(batches)) == before


def test_samples_of_a_micro_batch_are_of_similar_length():
    samples = outlined([IMAGE] * 4000)
    padding = sum(
        len(batch) * samples.lengths[list(batch)].max() - samples.lengths[list(batch)].sum()
        for batch in epoch(order(samples, batch_size=8, pool=32))
    )
    assert padding < 0.03 * samples.lengths.sum()  # at random: three quarters


@pytest.mark.parametrize("number", [0, 1, 2])
def test_micro_batches_of_one_step_are_alike(number):
    alike = 4
    batches = order(alike=alike)
    assert batches.num_batches % alike == 0
    together = [batches.batches(number * batches.num_batches + index) for index in range(batches.num_batches)]
    for start in range(0, len(together), alike):
        assert len({MIXED.kinds[batch[0]] for batch in together[start : start + alike]}) == 1


def test_a_kind_with_fewer_samples_than_ranks_comes_last():
    batches = order(outlined([IMAGE] * 64 + [VIDEO] * 3), alike=4)
    assert [len(batch) for batch in epoch(batches)[-3:]] == [1, 1, 1]
    assert batches.num_batches == 16 + 3


def test_weights_say_how_often_a_file_is_seen():
    samples = outlined([IMAGE] * 20, [IMAGE] * 20, [IMAGE] * 20 + [TEXT] * 10, weights=(2, 1, 0.5))
    batches = order(samples)
    found = seen(batches)
    assert [sum(found[sample] for sample in span) for span in (range(20), range(20, 40), range(40, 70))] == [40, 20, 15]
    assert all(found[sample] == 2 for sample in range(20))
    assert all(found[sample] <= 1 for sample in range(40, 70))
    assert batches.num_samples == 75


def test_samples_left_out_in_one_epoch_come_in_the_next():
    batches = order(outlined([IMAGE] * 30, weights=(0.4,)))
    both = seen(batches, 0) + seen(batches, 1)
    assert len(both) == 24
    assert set(both + seen(batches, 2)) == set(range(30))


def test_a_weight_with_a_fraction_repeats_only_some():
    found = seen(order(outlined([IMAGE] * 40, weights=(1.25,))))
    assert Counter(found.values()) == {1: 30, 2: 10}


def test_a_small_weight_shows_at_least_one_sample_of_each_kind():
    assert len(seen(order(outlined([IMAGE] * 3 + [TEXT], weights=(0.01,))))) == 2


def test_every_epoch_has_as_many_micro_batches():
    batches = order(outlined([IMAGE] * 37, [TEXT] * 11 + [IMAGE] * 5, weights=(0.7, 1.3)))
    totals = {sum(seen(batches, number).values()) for number in range(5)}
    assert totals == {batches.num_samples}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "batch_size of text is 0"),
        ({"batch_size": {"image": 4, "text": 4}}, "samples of kind 'video', but batch_size is for image, text"),
        ({"alike": 0}, "alike is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        order(**settings)


def test_there_is_no_micro_batch_before_the_first():
    with pytest.raises(ValueError, match="no micro-batch -1"):
        order().batches(-1)


def test_the_fingerprint_tells_other_orders():
    assert order().fingerprint == order().fingerprint
    others = [order(seed=2), order(batch_size=5), order(alike=2), order(pool=3), order(outlined([IMAGE] * 122))]
    assert len({order().fingerprint, *(other.fingerprint for other in others)}) == 6
