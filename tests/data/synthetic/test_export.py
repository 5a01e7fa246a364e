import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_mini_cli
from llava_mini.data.synthetic import export
from llava_mini.data.synthetic.export import ExportSettings, export_world, write_film
from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS, WorldSettings, world_record
from llava_mini.processor.video import FrameSampling, frames_of

SETTINGS = ExportSettings(images=40, clips=6, first=7)
SOURCE = Path(llava_mini_cli.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "world"
    export_world(folder, SETTINGS)
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def world_of(clips):
    return WorldSettings(min_turns=3, max_turns=3, clip_share=float(clips))


def start(*arguments, **streams):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "llava_mini_cli", *map(str, arguments)], env=environment, **streams)


def test_conversations_are_those_of_llava(folder):
    records = json.loads((folder / "train.json").read_text())
    assert len(records) == len({record["id"] for record in records}) == 46
    for record in records:
        (media,) = {"image", "video"} & set(record)
        assert set(record) == {"id", media, "conversations"}
        assert (folder / record[media]).is_file()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert 2 <= len(turns) <= 6
        text = "".join(turn["value"] for turn in turns)
        assert turns[0]["value"].startswith(f"<{media}>\n")
        assert text.count("<image>") + text.count("<video>") == 1
        assert all(turn["value"].strip() for turn in turns)
    assert sum("video" in record for record in records) == 6


def test_pictures_and_words_are_those_of_the_world(folder):
    records = {record["id"]: record for record in json.loads((folder / "train.json").read_text())}
    for index in range(7, 47):
        expected, found = world_record("train", index, world_of(clips=False)), records[f"train-image-{index:06d}"]
        assert np.array_equal(np.asarray(Image.open(folder / found["image"])), np.asarray(expected.image))
        words = [turn["value"].removeprefix("<image>\n") for turn in found["conversations"]]
        assert words == [text for turn in expected.turns for text in (turn.question, turn.answer)]


def test_one_frame_per_second_of_a_film_gives_back_the_frames_of_the_clip(folder):
    lengths = set()
    for index in range(7, 13):
        expected = world_record("train", index, world_of(clips=True)).video
        frames = list(frames_of(folder / f"videos/{index:06d}.mp4", FrameSampling()))
        assert [frame.time for frame in frames] == pytest.approx([number + 0.5 for number in range(len(expected))], 0.3)
        for frame, picture in zip(frames, expected, strict=True):
            difference = np.abs(np.asarray(frame.image, dtype=int) - np.asarray(picture, dtype=int))
            assert difference.mean() < 4
        lengths.add(len(expected))
    assert len(lengths) > 1


def test_a_frame_of_a_film_is_nearer_to_its_own_picture_than_to_any_other(tmp_path):
    pictures = [Image.new("RGB", (96, 96), colour) for colour in ("red", "blue", "white", "green")]
    write_film(tmp_path / "film.mp4", pictures)
    frames = [np.asarray(frame.image, dtype=int) for frame in frames_of(tmp_path / "film.mp4", FrameSampling())]
    distances = [[np.abs(frame - np.asarray(picture)).mean() for picture in pictures] for frame in frames]
    assert [int(np.argmin(row)) for row in distances] == [0, 1, 2, 3]


def test_facts_say_what_each_question_is_about(folder):
    records = json.loads((folder / "train.json").read_text())
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    assert [fact["id"] for fact in facts] == [record["id"] for record in records]
    for fact, record in zip(facts, records, strict=True):
        kinds = IMAGE_KINDS if "image" in record else CLIP_KINDS
        assert {turn["kind"] for turn in fact["turns"]} <= set(kinds)
        assert all(turn["form"] for turn in fact["turns"])
        assert not any(turn["held_out"] for turn in fact["turns"])
        words = [turn["value"].rpartition("\n")[2] for turn in record["conversations"]]
        assert words == [text for turn in fact["turns"] for text in (turn["question"], turn["answer"])]
        assert fact["file"] == record.get("image", record.get("video"))
    about = json.loads((folder / "about.json").read_text())
    assert about["counts"]["images"] == 40
    assert sum(about["counts"]["questions"].values()) == sum(len(fact["turns"]) for fact in facts)


def test_the_same_settings_give_the_same_bytes_whatever_the_number_of_processes(folder, tmp_path):
    assert export_world(tmp_path / "again", SETTINGS, processes=2).processes == 2
    assert files_of(tmp_path / "again") == files_of(folder)
    assert len(files_of(folder)) == 40 + 6 + 3


def test_ranges_and_splits_have_files_of_their_own(tmp_path):
    export_world(tmp_path / "a", ExportSettings(split="validation", images=3, clips=0))
    export_world(tmp_path / "b", ExportSettings(split="test", images=3, clips=0))
    export_world(tmp_path / "c", ExportSettings(split="test", images=3, clips=0, first=3))
    found = [{path.read_bytes() for path in (tmp_path / name / "images").iterdir()} for name in "abc"]
    assert len(set.union(*found)) == 9
    assert not (tmp_path / "a" / "videos").exists()
    assert [(tmp_path / "a" / "validation.json").exists(), (tmp_path / "b" / "test.json").exists()] == [True, True]


def test_an_export_goes_on_and_leaves_finished_files_alone(folder, tmp_path):
    export_world(tmp_path / "world", SETTINGS)
    kept = tmp_path / "world/images/000010.png"
    before = kept.stat().st_mtime_ns
    for name in ("images/000011.png", "videos/000009.mp4", "train.json"):
        (tmp_path / "world" / name).unlink()
    (tmp_path / "world/images/000012.png").write_bytes(b"")
    (tmp_path / "world/images/000011.png.part").write_bytes(b"half of a picture")
    made = export_world(tmp_path / "world", SETTINGS)
    assert made.drawn == {"image": 2, "video": 1}
    assert kept.stat().st_mtime_ns == before
    assert files_of(tmp_path / "world") == files_of(folder)


def test_a_killed_export_can_be_finished(tmp_path):
    flags = ("data", "synth", tmp_path / "world", "--images", 3000, "--clips", 0)
    process = start(*flags, "--processes", 2)
    while process.poll() is None and len(list((tmp_path / "world").glob("images/*.png"))) < 40:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "world/train.json").exists()
    time.sleep(1)
    left = len(list((tmp_path / "world/images").iterdir()))
    time.sleep(1)
    assert len(list((tmp_path / "world/images").iterdir())) == left < 3000  # nobody goes on without the parent
    made = export_world(tmp_path / "world", ExportSettings(images=3000, clips=0))
    assert 0 < made.drawn["image"] < 3000
    assert len(json.loads((tmp_path / "world/train.json").read_text())) == 3000
    assert not list((tmp_path / "world").rglob("*.part"))


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path):
    flags = ("data", "synth", tmp_path / "world", "--images", 100_000, "--processes", 2)
    process = start(*flags, stderr=subprocess.PIPE)
    while process.poll() is None and not list((tmp_path / "world").glob("images/*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert (process.returncode, told) == (130, b"")


def test_a_process_that_is_ended_from_outside_is_told(tmp_path, monkeypatch):
    workers = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *given, **named: workers.append(popen(*given, **named)) or workers[-1]
    )
    written = export._write_records(tmp_path, ExportSettings(images=100_000), processes=2)
    (tmp_path / "images").mkdir()
    next(written)
    workers[0].kill()
    with pytest.raises(OSError, match="ended with code -9.*Start the command again"):
        list(written)
    assert workers[1].returncode is not None


def test_a_full_disk_in_another_process_is_told_as_such(tmp_path):
    (tmp_path / "images").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="images"):
        list(export._write_records(tmp_path, ExportSettings(images=100), processes=2))


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda path: path.write_text("words"), "is a file. Give the name of a folder"),
        (lambda path: (path / "photos").mkdir(parents=True), "is not empty"),
        (lambda path: export_world(path, ExportSettings(images=1, clips=0)), "was made with images 1, not 40"),
        (lambda path: export_world(path, ExportSettings(split="test", images=40)), "was made with split test"),
        (lambda path: path.mkdir() or (path / "about.json").write_text("{}"), "was not written by this command"),
        (lambda path: path.mkdir() or (path / "about.json").write_text("no"), "was not written by this command"),
    ],
)
def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path, prepare, sentence):
    prepare(tmp_path / "world")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        export_world(tmp_path / "world", SETTINGS)
    assert files_of(tmp_path) == before


def test_a_folder_drawn_by_other_code_is_refused(tmp_path, monkeypatch):
    export_world(tmp_path, ExportSettings(images=1, clips=0))
    monkeypatch.setattr(export, "_fingerprint", lambda: "another")
    with pytest.raises(ValueError, match="was made with world [0-9a-f]+, not another"):
        export_world(tmp_path, ExportSettings(images=1, clips=0))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"split": "exam"}, "Unknown split 'exam'"),
        ({"images": -1}, "images is -1"),
        ({"clips": -1}, "clips is -1"),
        ({"first": -1}, "first is -1"),
        ({"images": 0, "clips": 0}, "Neither images nor clips"),
        ({"questions": 0}, "1 to 20"),
        ({"questions": 21}, "1 to 20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExportSettings(**wrong)


def test_the_command_says_what_it_made_and_how_fast(tmp_path, capsys):
    flags = ["--split", "test", "--images", "5", "--clips", "1", "--questions", "2"]
    assert llava_mini_cli.main(["data", "synth", str(tmp_path / "world"), *flags]) == 0
    told = capsys.readouterr()
    assert "world: 5 images, 1 clips, " in told.out
    assert "6 files drawn and written" in told.out
    assert "images with questions per second" in told.out
    assert told.err == ""
    about = json.loads((tmp_path / "world/about.json").read_text())
    assert about["command"] == "llava-mini data synth DIR --split test --images 5 --clips 1 --first 0 --questions 2"
    assert llava_mini_cli.main(["data", "synth", str(tmp_path / "world"), *flags]) == 0
    assert "All files were there" in capsys.readouterr().out


def test_a_wrong_number_on_the_command_line_ends_with_one_sentence(tmp_path, capsys):
    for flags, sentence in (
        (["--processes", "0"], "processes is 0"),
        (["--images", "-3"], "images is -3"),
    ):
        assert llava_mini_cli.main(["data", "synth", str(tmp_path / "world"), *flags]) == 2
        told = capsys.readouterr().err
        assert sentence in told
        assert told.count("\n") == 1
    assert not (tmp_path / "world").exists()
