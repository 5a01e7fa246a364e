"""Samples from Parquet files and tars, through the streaming of ``datasets``."""

import importlib.util
import io
import itertools
import json
import tarfile

import pytest

from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import Sample
from llava_mini.data.streaming import SampleStream, StreamSettings, find_shards
from tests.data.shards import mixed_shards, numbered_shards, turns, write_parquet
from tests.tiny_engine import picture


def png(value=0):
    file = io.BytesIO()
    picture(value).save(file, format="PNG")
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    """Five shards of 4 to 8 records, each of which asks for its own number."""
    return numbered_shards(tmp_path, range(4, 9))


def stream(shards, rank=0, world_size=1, batch_size=1, **settings):
    settings = StreamSettings(shards=shards, name="s", **settings)
    return SampleStream(settings, rank=rank, world_size=world_size, batch_size=batch_size)


def number_of(sample):
    return int(sample.messages[0]["content"][0]["text"].removeprefix("number "))


def numbers(samples):
    return [number_of(sample) for sample in samples]


def test_an_epoch_has_every_record_once_in_a_mixed_order_that_the_seed_decides(shards):
    order = numbers(stream(shards, seed=1))
    assert sorted(order) == list(range(30))
    assert order != sorted(order)
    assert numbers(stream(shards[::-1], seed=1)) == order
    assert numbers(stream(shards, seed=2)) != order


def test_each_epoch_has_its_own_order(shards):
    one = stream(shards)
    first, second = numbers(one), numbers(one)
    assert first != second
    assert sorted(first) == sorted(second)
    assert one.epoch == 2


def test_ids_are_unique_and_name_shard_and_record(shards, tmp_path):
    other = write_parquet(tmp_path / "folder" / "0.parquet", [{"conversations": turns("number 30")}])
    ids = [sample.id for sample in stream((*shards, other))]
    assert len(set(ids)) == 31
    assert {"s/0.parquet/0", "s/folder/0.parquet/0"} <= set(ids)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_an_epoch_without_overlap_even_if_there_are_fewer_shards(shards, world_size):
    parts = [numbers(stream(shards, rank, world_size)) for rank in range(world_size)]
    assert all(parts)
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(30))


@pytest.mark.parametrize(("rank", "world_size", "batch_size"), [(0, 1, 1), (0, 1, 2), (1, 2, 2), (3, 7, 1)])
def test_a_stream_goes_on_anywhere_in_an_epoch_as_if_it_had_not_stopped(shards, rank, world_size, batch_size):
    whole = stream(shards, rank, world_size, batch_size, window=3)
    expected = [numbers(whole), numbers(whole)]
    for place in range(0, len(expected[0]) + 1, 2):
        stopped = stream(shards, rank, world_size, batch_size, window=3)
        before = numbers(itertools.islice(stopped, place))
        state = json.loads(json.dumps(stopped.state_dict()))
        later = stream(shards, rank, world_size, batch_size, window=3)
        later.load_state_dict(state)
        assert [before + numbers(later), numbers(later)] == expected


def test_iterating_again_goes_on_where_the_last_iteration_stopped(shards):
    expected = numbers(stream(shards))
    one = stream(shards)
    assert numbers(itertools.islice(one, 7)) + numbers(one) == expected


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"window": 9}, {"rank": 1, "world_size": 2}, {"shards": 3}, {"batch_size": 2}]
)
def test_a_state_of_another_order_is_refused(shards, change):
    state = stream(shards).state_dict()
    with pytest.raises(ValueError, match="another order"):
        stream(shards[: change.pop("shards", 5)], **change).load_state_dict(state)


def length_of(sample):
    return sum(len(part["text"]) for message in sample.messages for part in message["content"] if "text" in part)


@pytest.mark.parametrize("window", [20, 40])
def test_micro_batches_are_full_and_of_one_kind_and_similar_length_but_where_kinds_meet(tmp_path, window):
    batches = list(stream(mixed_shards(tmp_path, [80]), batch_size=4, window=window).batches())
    assert [len(batch) for batch in batches] == [4] * 20
    assert len({sample.id for batch in batches for sample in batch}) == 80
    for start in range(0, 20, window // 4):
        pure: dict[str, list[list[int]]] = {"text": [], "image": [], "video": []}
        for batch in batches[start : start + window // 4]:
            kinds = {sample.kind for sample in batch}
            if len(kinds) == 1:
                pure[kinds.pop()].append(sorted(map(length_of, batch)))
        assert sum(map(len, pure.values())) >= window // 4 - 2  # three kinds meet twice
        for lengths in pure.values():
            assert all(before[-1] <= after[0] for before, after in itertools.pairwise(sorted(lengths)))


def test_micro_batches_come_in_another_order_in_each_epoch(tmp_path):
    one = stream(mixed_shards(tmp_path, [40]), batch_size=4)
    first, second = ([{sample.id for sample in batch} for batch in one.batches()] for _ in range(2))
    assert first != second
    assert set().union(*first) == set().union(*second)


def test_the_last_micro_batches_of_a_shard_share_what_is_left(tmp_path):
    sizes = [len(batch) for batch in stream(mixed_shards(tmp_path, [19, 2]), batch_size=4, window=12).batches()]
    assert sorted(sizes) == [2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_of_all_ranks_have_every_record_once(tmp_path, world_size):
    shards = mixed_shards(tmp_path, [19, 8])
    batches = [list(stream(shards, rank, world_size, batch_size=4).batches()) for rank in range(world_size)]
    seen = [sample.id for part in batches for batch in part for sample in batch]
    assert len(seen) == len(set(seen)) == 27
    assert max(len(batch) for part in batches for batch in part) <= 4


def test_media_of_a_parquet_row_are_bytes_structs_or_paths(tmp_path):
    image = png()
    rows = {
        "structs": [
            {"image": {"bytes": image, "path": "a.png"}, "conversations": turns("<image>\nwhat?")},
            {"image": {"bytes": None, "path": None}, "conversations": turns("only words")},
        ],
        "lists": [{"images": [{"bytes": image}, {"bytes": image}], "conversations": turns("<image><image>same?")}],
        "bytes": [{"image": image, "conversations": turns("<image>\nwhat?")}],
        "paths": [{"video": "clips/a.mp4", "conversations": turns("<video>\nwhat?")}],
        "addresses": [{"image": "data:image/png;base64,AAAA", "conversations": turns("<image>\nwhat?")}],
    }
    shards = tuple(write_parquet(tmp_path / f"{name}.parquet", some) for name, some in rows.items())
    found = {sample.id: sample for sample in stream(shards, media_folder=tmp_path)}
    assert [found[f"s/structs.parquet/{row}"].kind for row in range(2)] == ["image", "text"]
    assert [medium.source for medium in found["s/lists.parquet/0"].media] == [image, image]
    assert found["s/bytes.parquet/0"].media[0].source == image
    assert found["s/paths.parquet/0"].media[0].source == tmp_path / "clips/a.mp4"
    assert found["s/addresses.parquet/0"].media[0].source == "data:image/png;base64,AAAA"


def test_members_of_a_tar_with_one_key_are_one_record(tmp_path):
    images = [png(value) for value in range(12)]
    members = [
        ("set/a.json", json.dumps({"image": "x/y.png", "conversations": turns("<image>\nwhat?")}).encode()),
        ("set/a.png", images[0]),
        ("set/b.json", json.dumps({"conversations": turns("only words")}).encode()),
        *((f"set/c.{number}.png", image) for number, image in reversed(list(enumerate(images)))),
        ("set/c.json", json.dumps({"conversations": turns("<image>" * 12 + "many?")}).encode()),
        ("set/d.mp4", b"film"),
        ("set/d.json", json.dumps({"video": "d.mp4", "conversations": turns("<video>\nwhat?")}).encode()),
    ]
    found = {sample.id: sample for sample in stream((write_tar(tmp_path / "one.tar", members),))}
    kinds = {name: sample.kind for name, sample in found.items()}
    assert kinds == {
        "s/one.tar/set/a": "image",
        "s/one.tar/set/b": "text",
        "s/one.tar/set/c": "multi-image",
        "s/one.tar/set/d": "video",
    }
    assert [medium.source for medium in found["s/one.tar/set/c"].media] == images
    assert found["s/one.tar/set/d"].media[0].source == b"film"


def test_damaged_records_are_told_and_the_others_are_read(tmp_path):
    words = json.dumps({"conversations": turns("words")}).encode()
    image = json.dumps({"image": "a.png", "conversations": turns("<image>\nwhat?")}).encode()
    members = [
        ("a.json", b"{"),
        ("b.txt", b"words"),
        ("c.json", image),
        ("d.json", words),
        ("d.npy", b"array"),
        ("e.json", words),
        ("f.json", b"[]"),
    ]
    rows = [{"conversations": turns("<image>\nwhat?"), "image": "a.png"}, {"conversations": turns("words")}]
    shards = write_tar(tmp_path / "a.tar", members), write_parquet(tmp_path / "b.parquet", rows)
    found = list(stream(shards))
    damaged = {one.id: one.reason for one in found if isinstance(one, Damaged)}
    assert {one.id for one in found if isinstance(one, Sample)} == {"s/a.tar/e", "s/b.parquet/1"}
    expected = {
        "s/a.tar/a": "is damaged",
        "s/a.tar/b": "no .json",
        "s/a.tar/c": "names 1 images, but 0 are beside it",
        "s/a.tar/d": "the member .npy",
        "s/a.tar/f": "not an object",
        "s/b.parquet/0": "no folder of media",
    }
    assert set(damaged) == set(expected)
    assert all(reason in damaged[name] for name, reason in expected.items())


def spoil(path, how):
    content = bytearray(path.read_bytes())
    match how:
        case "cut":  # a tar between two members
            content = content[: len(content) // 2]
        case "cut in a member":
            content = content[: len(content) // 2 + 700]
        case "cut in a header":
            content = content[: len(content) // 2 + 100]
        case "header":  # of the third member
            content[2 * 1024 : 2 * 1024 + 200] = b"\xff" * 200
        case "end":
            content[-4:] = b"xxxx"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how", "sound"),
    [
        ("a.tar", "", 9),
        ("a.tar", "cut", 5),
        ("a.tar", "cut in a member", 4),  # the record before may lack a member
        ("a.tar", "cut in a header", 5),
        ("a.tar", "header", 2),
        ("a.parquet", "", 9),
        ("a.parquet", "cut", 0),
        ("a.parquet", "end", 0),
    ],
)
def test_a_damaged_shard_is_told_and_the_next_one_is_read(tmp_path, name, how, sound):
    path = tmp_path / name
    if name.endswith("tar"):
        words = "." * 400  # a header and a member of 512 bytes each
        members = [(f"{key}.json", json.dumps({"conversations": turns(words)}).encode()) for key in range(9)]
        write_tar(path, members)
    else:
        write_parquet(path, [{"conversations": turns(f"number {key}")} for key in range(9)])
    spoil(path, how)
    whole = write_parquet(tmp_path / "whole.parquet", [{"conversations": turns("number 100")}])
    found = list(stream((str(path), whole)))
    damaged = [one for one in found if isinstance(one, Damaged)]
    assert "s/whole.parquet/0" in [one.id for one in found]
    assert len(found) - len(damaged) - 1 == sound
    assert [(one.id, one.media) for one in damaged] == ([(f"s/{name}/end", str(path))] if how else [])


def test_a_missing_shard_and_a_table_of_something_else_are_told(tmp_path):
    other = write_parquet(tmp_path / "other.parquet", [{"text": "words"}])
    found = {one.id: one.reason for one in stream((other, str(tmp_path / "none.parquet")))}
    assert "its columns are text; a LLaVA record has 'conversations'" in found["s/other.parquet/end"]
    assert "No such file" in found["s/none.parquet/end"]


@pytest.mark.parametrize(
    ("shards", "settings", "message"),
    [
        ((), {}, "at least one shard"),
        (("a.tar", "a.tar"), {}, "named twice"),
        (("a.zip",), {}, "ends with '.zip'; shards are read that end with .parquet, .tar"),
        (("a.tar",), {"window": 0}, "window is 0"),
        (("a.tar",), {"rank": 2, "world_size": 2}, "no rank 2 among 2"),
        (("a.tar",), {"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(shards, settings, message):
    with pytest.raises(ValueError, match=message):
        stream(shards, **settings)


def test_the_extra_that_is_missing_is_named(shards, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llava-mini\[data\]'"):
        stream(shards)


def test_shards_are_found_by_patterns(shards, tmp_path):
    assert find_shards([f"{tmp_path}/*.parquet", shards[0]]) == shards
    with pytest.raises(ValueError, match="No file matches"):
        find_shards([f"{tmp_path}/*.tar"])
