import json

import pytest

from llava_mini.data.quarantine import Damaged, QuarantineLog, read_quarantine, write_quarantine


def damaged(*names):
    return [Damaged(id=f"set/{name}", media=f"{name}.png", reason=f"{name} is truncated.") for name in names]


def test_each_damaged_sample_stands_in_the_file_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    log = QuarantineLog(path, max_share=1)
    log.add(damaged("a", "b", "a"), num_samples=10)
    log.add(damaged("b", "c"), num_samples=10)
    QuarantineLog(path, max_share=1).add(damaged("c", "d"), num_samples=10)
    assert [one.id for one in read_quarantine(path)] == ["set/a", "set/b", "set/c", "set/d"]
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": "set/a",
        "media": "a.png",
        "reason": "a is truncated.",
    }
    assert (log.num_samples, log.num_damaged) == (20, 5)


def test_no_file_is_made_for_nothing(tmp_path):
    QuarantineLog(tmp_path / "quarantine.jsonl", max_share=0).add([], num_samples=4)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_too_large_a_share_ends_the_run_with_examples_and_the_file(tmp_path):
    log = QuarantineLog(tmp_path / "q.jsonl", max_share=0.01)
    log.add(damaged(*map(str, range(10))), num_samples=12)
    log.check()
    log.add(damaged("last"), num_samples=1)
    with pytest.raises(ValueError, match=r"11 of 13 samples are damaged.*q.jsonl.*set/0: 0 is truncated.*media"):
        log.check()


def test_the_share_is_taken_of_all_samples_of_all_starts():
    log = QuarantineLog(None, max_share=0.01, num_samples=5000, num_damaged=50)
    log.check()
    log.add(damaged("a"), num_samples=99)
    with pytest.raises(ValueError, match="51 of 5099"):
        log.check()
    log.add([], num_samples=1)
    log.check()


def test_a_share_of_zero_stops_at_the_first():
    log = QuarantineLog(None, max_share=0)
    log.add([], num_samples=10)
    log.check()
    log.add(damaged("a"), num_samples=1)
    with pytest.raises(ValueError, match="1 of 11"):
        log.check()


def test_a_line_that_a_kill_cut_off_is_written_again(tmp_path):
    path = tmp_path / "q.jsonl"
    QuarantineLog(path, max_share=1).add(damaged("a", "b"), num_samples=2)
    path.write_bytes(path.read_bytes()[:-9])
    assert [one.id for one in read_quarantine(path)] == ["set/a"]
    QuarantineLog(path, max_share=1).add(damaged("b"), num_samples=1)
    assert [one.id for one in read_quarantine(path)] == ["set/a", "set/b"]


def test_another_file_is_not_written_to(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="Line 1 of .* is no line of a quarantine list"):
        QuarantineLog(path, max_share=1)


def test_a_list_is_read_back_and_replaces_the_last_one(tmp_path):
    for listed in (damaged("a", "a"), damaged("b")):
        write_quarantine(tmp_path / "list.jsonl", listed)
        assert read_quarantine(tmp_path / "list.jsonl") == listed


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_the_share_lies_within_none_and_all(share):
    with pytest.raises(ValueError, match="must lie within 0"):
        QuarantineLog(None, max_share=share)
