import json
import pickle

import pytest

from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.samples import KINDS


def record(identity, question="Hello?", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]
    return {**({} if identity is None else {"id": identity}), **fields, "conversations": turns}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    else:
        path.write_text(json.dumps(records))
    return path


@pytest.fixture
def mixture(tmp_path):
    text = write(tmp_path / "text.jsonl", record("a"), record("b", "More?"), record(None))
    pictures = write(
        tmp_path / "sub" / "pictures.json",
        record("a", "<image>\nWhat?", image="x/a.png"),
        record("b", "<image><image>\nWhich?", images=["x/a.png", "x/b.png"]),
        record("c", "<video>\nWhat happens?", video="c.mp4"),
    )
    return Mixture([DataFile(path=text), DataFile(path=pictures, media_folder=tmp_path / "media", weight=2)])


def test_samples_of_all_files_follow_each_other(mixture, tmp_path):
    assert len(mixture) == 6
    assert [sample.id for sample in mixture] == [
        *("text/a", "text/b", "text/2"),
        *("pictures/a", "pictures/b", "pictures/c"),
    ]
    assert mixture[1].messages[0]["content"] == [{"type": "text", "text": "More?"}]
    assert mixture[3].media[0].source == tmp_path / "media" / "x" / "a.png"
    assert mixture[-1].id == mixture.id_of(-1) == "pictures/c"
    with pytest.raises(IndexError):
        _ = mixture[6]


def test_kinds_are_known_without_reading(mixture):
    assert [KINDS[number] for number in mixture.kinds] == ["text"] * 3 + ["image", "multi-image", "video"]
    assert mixture.first.tolist() == [0, 3, 6]
    assert mixture.weights == (1.0, 2)
    assert [KINDS[number] for number in mixture.kinds] == [sample.kind for sample in mixture]


def test_paths_start_at_the_folder_of_the_file_by_default(tmp_path):
    path = write(tmp_path / "set" / "train.json", record("a", "<image>?", image="images/a.png"))
    assert Mixture([DataFile(path=path)])[0].media[0].source == tmp_path / "set" / "images" / "a.png"


def test_a_mixture_travels_without_its_records(tmp_path):
    path = write(tmp_path / "long.jsonl", *(record(str(number), "word " * 1000) for number in range(100)))
    mixture = Mixture([DataFile(path=path)])
    travelled = pickle.dumps(mixture)
    assert len(travelled) < 100 * 18 + 2000 < path.stat().st_size / 100
    assert pickle.loads(travelled)[99] == mixture[99]


def test_an_id_that_comes_again_is_told_apart_by_its_number(tmp_path):
    path = write(tmp_path / "set.json", record("a"), record("a"), record(1), record("1"), record(None), record("4"))
    ids = [sample.id for sample in Mixture([DataFile(path=path)])]
    assert ids == ["set/a", "set/a#1", "set/1", "set/1#3", "set/4", "set/4#5"]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [write(tmp_path / folder / "train.json", record("a")) for folder in ("x/set", "y/set", "z")]
    mixture = Mixture([*(DataFile(path=path) for path in paths)])
    assert [sample.id for sample in mixture] == ["x/set/train/a", "y/set/train/a", "z/train/a"]


def test_one_name_for_two_files_is_refused(tmp_path):
    paths = [write(tmp_path / f"{name}.json", record("a")) for name in "ab"]
    with pytest.raises(ValueError, match="Two data files are called 'x'"):
        Mixture([DataFile(path=path, name="x") for path in paths])


def test_a_file_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.json", record("a"))
    with pytest.raises(ValueError, match="given 2 times. Give it once, with a higher weight"):
        Mixture([DataFile(path=path), DataFile(path=path, name="again")])


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_zero(tmp_path, weight):
    with pytest.raises(ValueError, match="it must be a number above 0"):
        DataFile(path=tmp_path / "a.json", weight=weight)


def test_a_malformed_record_is_refused_by_its_id_and_the_others_are_read(tmp_path):
    path = tmp_path / "set.jsonl"
    lines = [json.dumps(record("a", "<image>?")), "{broken", json.dumps("words"), json.dumps(record("\ud800"))]
    path.write_text("\n".join(lines))
    mixture = Mixture([DataFile(path=path)])
    assert [mixture.id_of(index) for index in range(4)] == ["set/a", "set/1", "set/2", "set/\\ud800"]
    for index, reason in enumerate(("'set/a' has 1 image", "no JSON", "'set/2' is a JSON str")):
        with pytest.raises(ValueError, match=reason):
            _ = mixture[index]
    assert mixture[3].id == "set/\\ud800"


@pytest.mark.parametrize(
    ("records", "reason"),
    [([], "it is empty"), ([{"messages": [], "id": 1}], "its 1 records hold id, messages"), ([1, 2], "hold nothing")],
)
def test_a_file_in_another_format_is_refused_with_what_it_holds(tmp_path, records, reason):
    with pytest.raises(ValueError, match=f"no records in the format of LLaVA: .*{reason}"):
        Mixture([DataFile(path=write(tmp_path / "other.json", *records))])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no data file"):
        Mixture([DataFile(path=tmp_path / "absent.json")])


def test_a_file_that_changes_during_a_run_ends_it(tmp_path):
    path = write(tmp_path / "a.json", record("a"))
    mixture = Mixture([DataFile(path=path)])
    write(path, record("another"), record("a"))
    with pytest.raises(OSError, match="was changed while it was in use"):
        _ = mixture[0]


def test_no_files_are_no_mixture():
    with pytest.raises(ValueError, match="at least one data file"):
        Mixture([])


def test_the_fingerprint_tells_other_records_and_weights(tmp_path):
    path = write(tmp_path / "a.json", record("a"))
    before = Mixture([DataFile(path=path)]).fingerprint
    assert Mixture([DataFile(path=path)]).fingerprint == before
    assert Mixture([DataFile(path=path, weight=2)]).fingerprint != before
    write(path, record("a"), record("b"))
    assert Mixture([DataFile(path=path)]).fingerprint != before
