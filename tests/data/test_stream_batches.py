"""Micro-batches of a stream: by number, whoever asks for them, and from any place on."""

import itertools
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from llava_mini.data import stream_batches
from llava_mini.data.quarantine import Damaged
from llava_mini.data.stream_batches import StreamBatches
from llava_mini.data.streaming import StreamSettings
from llava_mini.data.tuning_batch import TuningBatch
from llava_mini.training.prefetch import Prefetch
from tests.data.shards import mixed_shards, turns, write_parquet


@pytest.fixture
def shards(tmp_path):
    return mixed_shards(tmp_path, [6] * 6)


def named(items):
    """A batch of names: what the records show is not opened."""
    damaged = tuple(item for item in items if isinstance(item, Damaged))
    return TuningBatch(inputs=None, ids=tuple(item.id for item in items if item not in damaged), damaged=damaged)


def batches(shards, *, seed=0, **options):
    options = {"batch_size": 2, "micro_batches": 4, **options}
    return StreamBatches(StreamSettings(shards=shards, name="s", seed=seed), named, **options)


def ids(made, numbers):
    return [made(number).ids for number in numbers]


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 6])
def test_an_epoch_of_equal_shards_has_every_record_once(shards, micro_batches):
    seen = list(itertools.chain.from_iterable(ids(batches(shards, micro_batches=micro_batches), range(18))))
    assert len(seen) == len(set(seen)) == 36


@pytest.mark.parametrize("processes", [2, 4])
def test_a_micro_batch_is_the_same_for_any_number_of_processes(shards, processes):
    expected = ids(batches(shards), range(24))
    each = [batches(shards) for _ in range(processes)]
    assert [each[number % processes](number).ids for number in range(24)] == expected


def test_a_process_opens_the_shards_of_its_own_lanes_alone(shards, monkeypatch):
    opened = set()
    read = StreamSettings.sample
    monkeypatch.setattr(StreamSettings, "sample", lambda self, item: opened.add(item["shard"]) or read(self, item))
    ids(batches(shards, micro_batches=2), range(1, 18, 2))
    assert len(opened) == 3


def test_a_run_that_goes_on_gets_the_micro_batches_of_an_uninterrupted_one(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_batches, "PLACES_EVERY", 3)
    expected = ids(batches(shards), range(40))
    first = batches(shards, places=tmp_path / "places")
    ids(first, range(21))
    later = batches(shards, places=tmp_path / "places")
    read = []
    sample = StreamSettings.sample
    monkeypatch.setattr(StreamSettings, "sample", lambda self, item: read.append(item) or sample(self, item))
    assert later(20).ids == expected[20]  # of two lanes' micro-batches 0 to 9, this is the first one's eleventh
    assert len(read) == 4  # from the place before the tenth
    assert ids(later, (21, 39, 4)) == [expected[number] for number in (21, 39, 4)]


@pytest.mark.parametrize("stop", range(1, 24, 3))
def test_micro_batches_of_several_kinds_are_the_same_after_any_stop(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(stream_batches, "PLACES_EVERY", 2)
    shards = mixed_shards(tmp_path, [21, 14])
    expected = ids(batches(shards, batch_size=4), range(24))
    seen = list(itertools.chain.from_iterable(expected))
    assert len(seen) > len(set(seen)) == 35  # the second epoch has begun
    before = ids(batches(shards, batch_size=4, places=tmp_path / "places"), range(stop))
    assert before + ids(batches(shards, batch_size=4, places=tmp_path / "places"), range(stop, 24)) == expected


def test_a_place_that_a_kill_cut_off_is_passed_over(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_batches, "PLACES_EVERY", 1)
    expected = ids(batches(shards, micro_batches=1), range(8))
    ids(batches(shards, micro_batches=1, places=tmp_path), range(4))
    (written,) = tmp_path.glob("*.jsonl")
    written.write_text(written.read_text()[:-20])
    assert ids(batches(shards, micro_batches=1, places=tmp_path), range(4, 8)) == expected[4:]
    assert ids(batches(shards, micro_batches=1, places=tmp_path), range(6, 8)) == expected[6:]


def test_places_of_another_order_or_size_are_refused(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_batches, "PLACES_EVERY", 1)
    ids(batches(shards, places=tmp_path), range(4))
    with pytest.raises(ValueError, match="another order"):
        batches(shards, seed=5, places=tmp_path)(2)
    with pytest.raises(ValueError, match="has batch_size 2, but this one has 3"):
        batches(shards, batch_size=3, places=tmp_path)(2)


def test_processes_that_make_batches_make_the_same(shards, tmp_path):
    made = batches(shards, places=tmp_path)
    expected = ids(batches(shards), range(3, 12))
    made(2)
    with Prefetch(pickle.loads(pickle.dumps(made)), workers=2) as ahead:
        assert ids(ahead, range(3, 12)) == expected


def test_damaged_records_of_a_stream_are_in_their_batch(tmp_path):
    rows = [{"conversations": turns(f"number {number}")} for number in range(3)]
    rows.append({"conversations": turns("<image>\nwhat?")})
    batch = batches((write_parquet(tmp_path / "a.parquet", rows),), batch_size=4)(0)
    assert (len(batch.ids), [one.id for one in batch.damaged]) == (3, ["s/a.parquet/3"])


def test_a_shard_that_is_missing_makes_no_micro_batch_of_its_own(tmp_path):
    shards = (*mixed_shards(tmp_path, [4]), str(tmp_path / "missing.parquet"))
    made = list(map(batches(shards, batch_size=4, micro_batches=1), range(4)))  # an epoch each
    assert [len(batch.ids) for batch in made] == [4] * 4
    assert {one.id for batch in made for one in batch.damaged} == {"s/missing.parquet/end"}


def test_a_stream_without_records_is_an_error_and_not_an_endless_search(tmp_path):
    empty = pyarrow.Table.from_pylist([], schema=pyarrow.schema([("conversations", pyarrow.string())]))
    pyarrow.parquet.write_table(empty, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="found no record"):
        batches((str(tmp_path / "a.parquet"),))(0)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"micro_batches": 0}])
def test_numbers_that_cannot_be_are_refused(shards, options):
    with pytest.raises(ValueError, match="is 0; it must be 1 or more"):
        batches(shards, **options)
