"""A cache gives back what was put, within its budget, and never what a damaged or foreign file holds."""

import threading

import pytest
import torch

from llava_mini.inference.tensor_cache import TensorCache


def tensors(value=0.0, rows=4):
    return {"keys": torch.full((rows, 8), value), "values": torch.full((rows, 8), value)}


SIZE = sum(tensor.nbytes for tensor in tensors().values())


def test_tensors_come_back_as_they_were_put_and_do_not_share_their_memory():
    cache, one = TensorCache(2**20), tensors(1.0)
    cache.put("a", one, cache.new_turn())
    one["keys"].zero_()
    found = cache.get("a", cache.new_turn())
    assert found is not None
    assert found["keys"].eq(1).all()
    assert cache.get("b", cache.new_turn()) is None
    assert (cache.stats.hits_in_memory, cache.stats.misses, cache.stats.hit_rate) == (1, 1, 0.5)
    cache.clear()
    assert ("a" in cache, len(cache), cache.num_bytes) == (False, 0, 0)


def test_the_least_recently_used_are_forgotten_within_the_budget():
    cache = TensorCache(3 * SIZE)
    for key in "abc":
        cache.put(key, tensors(), cache.new_turn())
    cache.get("a", cache.new_turn())
    cache.put("d", tensors(), cache.new_turn())
    assert [key for key in "abcd" if key in cache] == ["a", "c", "d"]
    assert cache.num_bytes == 3 * SIZE
    cache.put("large", tensors(rows=400), cache.new_turn())
    assert "large" not in cache
    assert cache.num_bytes <= cache.max_bytes


def test_of_a_film_larger_than_the_budget_the_first_frames_stay():
    cache = TensorCache(3 * SIZE)
    for hits in (0, 3, 3):
        turn, before = cache.new_turn(), cache.stats.hits_in_memory
        for key in "abcdefgh":
            if cache.get(key, turn) is None:
                cache.put(key, tensors(), turn)
        assert cache.stats.hits_in_memory - before == hits


def test_what_there_is_no_room_for_is_not_copied(tmp_path):
    cannot_be_copied = {"keys": torch.empty(SIZE, device="meta")}
    cache = TensorCache(SIZE)
    turn = cache.new_turn()
    cache.put("large", cannot_be_copied, turn)
    cache.put("a", tensors(), turn)
    cache.put("of the same turn", {"keys": cannot_be_copied["keys"][:1]}, turn)
    assert [key for key in ("large", "a", "of the same turn") if key in cache] == ["a"]
    with pytest.raises(NotImplementedError):
        TensorCache(SIZE, tmp_path).put("written", cannot_be_copied, turn)


def test_tensors_outlive_the_memory_in_a_folder(tmp_path):
    first = TensorCache(0, tmp_path)
    first.put("abc", tensors(3.0), first.new_turn())
    again = TensorCache(2**20, tmp_path)
    assert "abc" in again
    found = again.get("abc", again.new_turn())
    assert found is not None
    assert found["values"].eq(3).all()
    again.get("abc", again.new_turn())
    assert (again.stats.hits_on_disk, again.stats.hits_in_memory) == (1, 1)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


@pytest.mark.parametrize("damage", ["cut", "noise", "foreign", "empty"])
def test_a_damaged_or_foreign_file_is_told_of_and_not_used(tmp_path, damage):
    cache = TensorCache(0, tmp_path)
    cache.put("abc", tensors(), 1)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content = path.read_bytes()
    if damage == "foreign":
        cache.put("abd", tensors(5.0), 1)
        path.write_bytes((path.parent / path.name.replace("abc", "abd")).read_bytes())
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "noise": b"noise" * 100, "empty": b""}[damage])
    with pytest.warns(UserWarning, match="is not what this cache wrote"):
        assert cache.get("abc", 2) is None
    cache.put("abc", tensors(2.0), 2)
    found = cache.get("abc", 3)
    assert found is not None
    assert found["keys"].eq(2).all()


def test_threads_may_write_the_same_keys(tmp_path):
    cache, errors = TensorCache(0, tmp_path), []

    def work():
        try:
            for key in range(40):
                cache.put(str(key), tensors(float(key)), 1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(list(tmp_path.rglob("*.safetensors"))) == 40 == len([p for p in tmp_path.rglob("*") if p.is_file()])


def test_threads_may_share_a_cache():
    cache = TensorCache(5 * SIZE)
    wrong = []

    def work(number):
        for step in range(200):
            key = str((number * 7 + step) % 11)
            found = cache.get(key, cache.new_turn())
            if found is not None and not found["keys"].eq(float(key)).all():
                wrong.append(key)
            cache.put(key, tensors(float(key)), cache.new_turn())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.num_bytes == len(cache) * SIZE <= cache.max_bytes


def test_impossible_caches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes=-1"):
        TensorCache(-1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot live in"):
        TensorCache(0, tmp_path / "file")
