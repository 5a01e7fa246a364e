"""Reading all data before training does."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import llava_mini_cli
from llava_mini.config import LlavaMiniConfig
from llava_mini.data.check import CheckSettings, DataCheck, PieceCheck, Records, Shards, marked_text
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.published import PUBLISHED_SETS
from llava_mini.data.quarantine import read_quarantine
from llava_mini.data.streaming import StreamSettings
from llava_mini.data.tuning_batch import TuningCollator
from llava_mini.recipes.tuning import TuningSettings
from tests.tiny_engine import picture, save_tiny, tiny_parts, write_film

SOURCE = Path(llava_mini_cli.__file__).parent


def record(name, question="what?", answer="yes", **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **media, "conversations": turns}


SOUND = [
    record("words", "who?"),
    record("image", "<image>\nwhat?", "a star", image="set/good.png"),
    record("two", "<image><image>same?", "no", images=["set/good.png", "good.png"]),
    record("film", "<video>\nwhat moves?", "all", video="film.mp4"),
]
DAMAGED = [
    record("missing", "<image>\nwhat?", image="none.png"),
    record("truncated", "<image>\nwhat?", image="truncated.png"),
    record("mark", "<image>\nwhat?"),
    record("long", "very " * 400 + "long?", "x"),
    record("film cut", "<video>\nwhat?", video="cut.mp4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Media, and lists of sound and of damaged records."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "set").mkdir()
    for path in ("set/good.png", "good.png", "truncated.png"):
        picture(size=(40, 30)).save(folder / path)
    content = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(content[: len(content) // 2])
    content = write_film(folder / "film.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "sound.json").write_text(json.dumps(SOUND))
    (folder / "all.json").write_text(json.dumps([*SOUND, *DAMAGED]))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


def check(*paths, **settings):
    tiny, processor = tiny_parts()
    if paths[0].suffix == ".parquet":
        source = Shards(stream=StreamSettings(shards=tuple(map(str, paths)), name="shards"))
    else:
        source = Records(mixture=Mixture([DataFile(path=path) for path in paths]))
    return DataCheck(source, processor, tiny.config, CheckSettings(**settings))


def test_sound_records_are_counted_by_kind_with_their_tokens(folder):
    report = check(folder / "sound.json").run()
    assert report.is_clean
    assert report.kinds == {"text": 1, "image": 1, "multi-image": 1, "video": 1}
    assert [record.vision for record in report.records] == [0, 1, 2, 3]  # 3 seconds of film
    assert [record.folder for record in report.records] == ["", "set", "set", ""]
    for record in report.records:
        assert record.tokens > record.learned > 0
    assert "damaged: 0 of 4" in report.text()


def test_each_fault_is_found_with_its_reason(folder):
    report = check(folder / "all.json").run()
    found = {record.damaged.id: (record.fault, record.damaged.reason) for record in report.records if record.damaged}
    expected = {
        "all/missing": ("media", "no file"),
        "all/truncated": ("media", "truncated or damaged"),
        "all/mark": ("record", "1 image in its questions, but names no image"),
        "all/long": ("prompt", "max_length=512"),
        "all/film cut": ("media", "film"),
    }
    assert {name: fault for name, (fault, _) in found.items()} == {name: fault for name, (fault, _) in expected.items()}
    for name, (_, reason) in expected.items():
        assert reason in found[name][1].replace("video", "film")
    text = report.text()
    assert "damaged: 5 of 9" in text
    assert "missing or damaged files: 3" in text
    assert not report.is_clean


class Fatal(TuningCollator):
    """Stands for a decoder that crashes, and for one that raises what nobody expects."""

    def __call__(self, samples):
        if samples[0].id in ("all/image", "shards/a.parquet/0"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if samples[0].id == "all/two":
            raise MemoryError("too large")
        return super().__call__(samples)


def test_a_file_that_crashes_its_reader_is_damaged_and_processes_find_of_the_rest_what_one_finds(folder):
    work = check(folder / "all.json", processes=2)
    work.collator = Fatal(work.collator.processor, max_length=512)
    report = work.run()
    crashes = {record.damaged.id: record.damaged.reason for record in report.records if record.fault == "crash"}
    assert set(crashes) == {"all/image", "all/two"}
    assert "died (signal 11)" in crashes["all/image"]
    assert crashes["all/two"] == "MemoryError: too large"
    alone = check(folder / "all.json", processes=1).run()
    pairs = [(one, other) for one, other in zip(report.records, alone.records, strict=True) if one.fault != "crash"]
    assert len(pairs) == 7
    assert all(one == other for one, other in pairs)


def test_what_is_cut_is_counted_and_not_damaged(folder):
    report = check(folder / "sound.json", max_length=24).run()
    cut = [record for record in report.records if record.is_cut]
    assert cut
    assert all(record.tokens == 24 and record.fault is None for record in cut)


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"processes": 0}, "processes is 0"),
        ({"examples": -1}, "examples is -1"),
        ({"published": "x"}, "no published set"),
    ):
        with pytest.raises(ValueError, match=message):
            CheckSettings(**settings)


def test_a_published_set_is_compared_by_kind_and_folder(folder, monkeypatch):
    small = replace(PUBLISHED_SETS["llava-v1.5-mix665k"], exact={"image": 2, "text": 1}, folders={"set": 2, "coco": 1})
    monkeypatch.setitem(PUBLISHED_SETS, "small", small)
    report = check(folder / "sound.json", published="small").run()
    assert set(report.differences) == {
        "1 records of kind image, expected 2",
        "1 records of kind multi-image, expected 0",
        "1 records of kind video, expected 0",
        "0 records with media in coco/, expected 1",
    }
    assert not report.is_clean
    assert "not as published: 1 records of kind image, expected 2" in report.text()


def test_examples_show_what_is_fused_what_is_learned_and_frames(folder):
    work = check(folder / "sound.json", examples=4)
    shown = work.examples(work.run())
    assert [one.split(" ")[0] for one in shown] == ["sound/words", "sound/image", "sound/two", "sound/film"]
    lines = shown[1].splitlines()
    assert lines[0] == f"sound/image (image: {folder / 'set/good.png'})"
    marks = [line.split("|")[0].strip() for line in lines[1:] if line.split("|")[0].strip()]
    assert marks[:4] == ["fused", "vision", "fused", "learned"]
    assert "  vision  | 1 token" in lines
    assert next(line for line in lines if line.startswith("  learned")).startswith("  learned | a star")
    assert "fused" not in shown[0]  # nothing to be fused with


def test_marks_cover_every_token_once_and_follow_the_configuration(folder):
    model, processor = tiny_parts()
    sample = Mixture([DataFile(path=folder / "sound.json")])[1]
    inputs = TuningCollator(processor)([sample]).inputs
    runs = marked_text(inputs, processor.tokenizer, model.config)
    text = "".join("" if mark == "vision" else text for mark, text in runs)
    real = inputs.input_ids[0, : int(inputs.attention_mask.sum())]
    assert text == processor.tokenizer.decode(real[real != model.config.image_token_id])
    plain = LlavaMiniConfig(**{**model.config.to_dict(), "prefusion_num_layers": 0})
    assert {mark for mark, _ in marked_text(inputs, processor.tokenizer, plain)} == {"plain", "vision", "learned"}


def test_a_check_can_be_sent_to_a_process(folder):
    work = check(folder / "sound.json")
    one = PieceCheck(source=work.source, collator=work.collator)
    assert pickle.loads(pickle.dumps(one))(1) == one(1)


@pytest.fixture
def shards(folder, tmp_path):
    """Three sound records and a malformed one, and a shard that is cut off."""
    image = {"bytes": (folder / "good.png").read_bytes(), "path": "good.png"}
    rows = [
        {**record("words", "who?"), "image": None},
        {**record("mark", "<image>\nwhat?"), "image": None},
        {**record("image", "<image>\nwhat?", "a star"), "image": image},
        {**record("long", "very " * 400 + "long?", "x"), "image": None},
    ]
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    paths[1].write_bytes(paths[1].read_bytes()[:-4])
    return paths


def test_shards_are_checked_record_by_record_in_their_order(shards):
    work = check(*shards, published="llava-onevision-single-image", examples=2)
    report = work.run()
    assert [(one.kind, one.fault) for one in report.records] == [
        *(("text", None), (None, "record"), ("image", None), ("text", "prompt"), (None, "media"))
    ]
    assert [one.id for one in report.damaged] == ["shards/a.parquet/1", "shards/a.parquet/3", "shards/b.parquet/end"]
    assert report.differences == ("3 records, expected 3200000 to the nearest 100000",)
    assert "published: Parquet files of many subsets at https://" in report.text()
    assert [one.split(" ")[0] for one in work.examples(report)] == ["shards/a.parquet/0", "shards/a.parquet/2"]


def test_a_shard_that_crashes_its_reader_is_damaged_and_the_others_are_read(shards):
    work = check(*shards, processes=2)
    work.collator = Fatal(work.collator.processor)
    first, second = work.run().records
    assert (first.fault, first.damaged.id, second.fault) == ("crash", str(shards[0]), "media")


def test_what_training_has_too_has_its_defaults():
    shared = [name for name in vars(CheckSettings()) if name in vars(TuningSettings())]
    assert shared == ["num_frames", "fps", "max_frames", "max_length", "captions"]
    assert {name: getattr(CheckSettings(), name) for name in shared} == {
        name: getattr(TuningSettings(), name) for name in shared
    }


def run(*arguments):
    return llava_mini_cli.main([str(argument) for argument in arguments])


def test_the_command_ends_with_0_for_sound_data_and_1_for_damaged(folder, model, tmp_path, capsys):
    assert run("data", "check", folder / "sound.json", "--model", model, "--samples", 1) == 0
    told = capsys.readouterr().out
    assert "damaged: 0 of 4" in told
    assert "4 records read in" in told
    listed = tmp_path / "list.jsonl"
    assert run("data", "check", folder / "all.json", "--model", model, "--quarantine", listed) == 1
    assert "damaged: 5 of 9" in capsys.readouterr().out
    assert len(read_quarantine(listed)) == 5


def test_the_command_checks_shards(shards, model, tmp_path, capsys):
    arguments = (tmp_path / "*.parquet", "--model", model, "--samples", 0, "--quarantine", tmp_path / "list.jsonl")
    assert run("data", "check", *arguments) == 1
    assert "damaged: 3 of 5" in capsys.readouterr().out
    assert len(read_quarantine(tmp_path / "list.jsonl")) == 3


def test_captions_are_checked_with_the_template_of_stage_1(folder, model, tmp_path, capsys):
    (tmp_path / "image.json").write_text(json.dumps(SOUND[1:2]))
    assert run("data", "check", tmp_path / "image.json", "--media", folder, "--model", model, "--captions") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line[10:11] == "|" and line.strip() != "|"]
    assert [line.split("|")[0].strip() for line in shown] == ["fused", "vision", "learned"]
    assert shown[2] == "  learned | a star"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.json"], "There is no data file"),
        (["sound.json", "--media", "none"], "There is no folder"),
        (["sound.json", "--quarantine", "."], "is a folder. Give the name of a file."),
        (["sound.json", "--processes", "0"], "processes is 0"),
        (["sound.json", "--model", "none"], "There is no model"),
        (["sound.json", "--media", ".", "."], "1 data files came with 2 media folders"),
        (["sound.json", "a.tar"], "'sound.json' came with the shard 'a.tar'. Give files or shards, not both"),
        (["none*.tar"], "No file matches 'none*.tar'"),
    ],
)
def test_what_cannot_be_checked_ends_with_2_and_one_sentence(folder, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(folder)
    assert run("data", "check", *arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_ctrl_c_ends_with_130_and_leaves_no_process(tmp_path, model):
    side = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(side).save(tmp_path / "large.png")
    records = [record(str(number), "<image>\nwhat?", image="large.png") for number in range(2000)]
    (tmp_path / "many.json").write_text(json.dumps(records))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "llava_mini_cli", "data", "check", tmp_path / "many.json", "--model", model),
            *("--processes", "2"),
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    children = children_of(process.pid, 2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told) == (130, b"", b"")
    assert not [child for child in children if Path("/proc", child).exists()]


def children_of(process, number):
    """The processes that a process has started, once there are so many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if len(children) == number:
            return children
        time.sleep(0.1)
    raise AssertionError("The processes did not start.")
