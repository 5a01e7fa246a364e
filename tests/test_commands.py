"""What commands print, and the one sentence that they end with when the input is bad."""

import errno
import io
import json
import re
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest

import llava_mini_cli
from llava_mini import commands
from llava_mini.config import PRESETS, preset
from llava_mini.data.records import Turn
from llava_mini.data.synthetic.export import Exported
from llava_mini.evaluation import card
from llava_mini.evaluation.bench import Bench
from llava_mini.evaluation.card import read_scores
from llava_mini.evaluation.exact_match import CAPTION_KINDS, Mark, Score
from llava_mini.inference import devices
from llava_mini.inference.memory import meta_model
from llava_mini.processor.video import FrameSampling, frames_of
from llava_mini.recipes import study, tiny
from llava_mini.training.devices import Hardware
from tests.tiny_engine import picture, save_tiny, tiny_engine, tiny_parts, write_film

TURN = Turn(question="?", answer="red", kind="colour", form="colour of a shape")
MARKS = [Mark(turn=TURN, index=0, answer="red", guess="blue")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with good and bad files, as the working directory."""
    monkeypatch.chdir(tmp_path)
    picture().save("good.png")
    picture(1, (64, 64)).save("truncated.png")
    whole = (tmp_path / "truncated.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty.png").touch()
    write_film(tmp_path / "film.mp4")
    with av.open("sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return tmp_path


@pytest.fixture(autouse=True)
def _same_on_every_machine(monkeypatch):
    """Answers come from the CPU, and what a command changes about warnings is undone."""
    monkeypatch.setattr(devices, "_is_available", lambda kind: kind == "cpu")
    with warnings.catch_warnings():
        yield


def run(*arguments):
    return llava_mini_cli.main([str(argument) for argument in arguments])


def answer(media, max_tokens):
    return tiny_engine().ask("what?", media, max_tokens=max_tokens).text


def test_ask_prints_the_answer_and_nothing_else(folder, files, capsys):
    assert run("ask", "what?", "good.png", "--model", folder, "--max-tokens", 12) == 0
    told = capsys.readouterr()
    assert told.out == answer(picture(), 12) + "\n"
    assert told.err == ""


def test_stats_go_to_stderr(folder, files, capsys):
    assert (
        run("ask", "what?", "film.mp4", "good.png", "--model", folder, "--max-tokens", 3, "--frames", 2, "--stats") == 0
    )
    told = capsys.readouterr()
    assert "3 vision tokens" in told.err
    assert "3 frames" in told.err
    for part in ("media decode", "vision", "reduction", "pre-fusion", "prefill", "generation"):
        assert part in told.err
    assert "prefill" not in told.out


@pytest.mark.parametrize(
    ("flags", "frames"), [([], 3), (["--frames", 5], 5), (["--fps", 2], 6), (["--all-frames"], 12)]
)
def test_flags_choose_the_frames_of_a_film(folder, files, capsys, flags, frames):
    assert run("ask", "what?", "film.mp4", "--model", folder, "--max-tokens", 1, "--stats", *flags) == 0
    assert f"{frames} frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["what?", "nowhere.png"], "There is no file 'nowhere.png'"),
        (["what?", "notes.txt"], "'notes.txt' is neither an image nor a video"),
        (["what?", "empty.png"], "'empty.png' is neither an image nor a video"),
        (["what?", "truncated.png"], "'truncated.png' is truncated"),
        (["what?", "sound.wav"], "'sound.wav' has sound but no video"),
        (["what?", "."], "'.' is not a file"),
        (["what?", "https://example.org/a.png"], "addresses are not fetched"),
        (["what?"], "There is no image or video to ask about"),
        ([" ", "good.png"], "The question is empty"),
        (["what?", "good.png", "--max-tokens", 0], "max_tokens must be at least 1"),
        (["what?", "good.png", "--temperature", -1], "temperature must be 0 or a positive number"),
        (["what?", "film.mp4", "--frames", 0], "num_frames is 0"),
        (["what?", "film.mp4", "--frames", 600], "context holds 512"),
        (["what? " * 200, "good.png"], "context holds 512"),
        (["what?", "good.png", "--device", "cuda:99"], "'cuda:99' was asked for"),
        (["what?", "good.png", "--device", "toaster"], "There is no device 'toaster'"),
        (["what?", "good.png", "--dtype", "float16", "--device", "cpu"], "Take bfloat16"),
        (["what?", "good.png", "--model", "nothing"], "There is no model 'nothing'"),
        (["what?", "good.png", "--model", "."], "'.' holds no config.json"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(folder, files, capsys, arguments, sentence):
    model = [] if "--model" in arguments else ["--model", folder]
    assert run("ask", *arguments, *model) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("llava-mini: ")
    assert sentence in told.err
    assert told.err.count("\n") == 1


def test_files_are_looked_at_before_a_model_is_loaded(files, monkeypatch, capsys):
    monkeypatch.setattr(commands.Engine, "load", None)
    assert run("ask", "what?", "nowhere.png") == 2
    assert run("chat", "nowhere.png") == 2
    assert capsys.readouterr().err.count("There is no file") == 2


def test_our_warnings_are_told_in_one_line_and_those_of_libraries_are_not(folder, files, capsys):
    assert run("ask", "what? " * 60, "good.png", "--model", folder) == 0
    warnings.warn("a library's own affair", FutureWarning, stacklevel=1)
    told = capsys.readouterr().err
    assert told.startswith("llava-mini: warning: max_tokens is cut from 512 to ")
    assert told.count("\n") == 1


def chat(monkeypatch, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return run("chat", *arguments)


def test_a_chat_answers_lines_from_a_pipe(folder, files, capsys, monkeypatch):
    lines = ["what?", "", "/add film.mp4", "and now?", "/reset", "what?", "/quit", "never asked"]
    assert chat(monkeypatch, lines, "good.png", "--model", folder, "--max-tokens", 8) == 0
    conversation = tiny_engine().chat(picture(), commands.AnswerSettings(max_tokens=8))
    expected = ["".join(conversation.say("what?"))]
    conversation.add(files / "film.mp4")
    expected += ["".join(conversation.say("and now?")), expected[0]]
    told = capsys.readouterr()
    assert told.out == "".join(f"{answer}\n" for answer in expected)
    assert told.err == ""


def test_a_chat_needs_no_files_to_begin_with(folder, files, capsys, monkeypatch):
    assert chat(monkeypatch, ["hello"], "--model", folder, "--max-tokens", 4) == 0
    assert capsys.readouterr().out == tiny_engine().ask("hello", max_tokens=4).text + "\n"


def test_an_error_in_a_chat_ends_the_turn_and_not_the_chat(folder, files, capsys, monkeypatch):
    lines = ["/add nowhere.png", "/add", "/dance", "/add truncated.png", "what?", "what?"]
    assert chat(monkeypatch, lines, "good.png", "--model", folder, "--max-tokens", 4) == 0
    told = capsys.readouterr()
    assert told.out == answer(picture(), 4) + "\n"
    for sentence in (
        "There is no file 'nowhere.png'",
        "'/add' is not",
        "'/dance' is not",
        "truncated.png' is truncated",
    ):
        assert sentence in told.err


def test_help_in_a_chat_lists_every_command(folder, capsys, monkeypatch):
    assert chat(monkeypatch, ["/help"], "--model", folder) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("/add FILE", "/reset", "/help", "/quit", "Ctrl-C"))


def test_stats_in_a_chat_follow_each_answer(folder, files, capsys, monkeypatch):
    assert chat(monkeypatch, ["what?", "why?"], "good.png", "--model", folder, "--max-tokens", 4, "--stats") == 0
    assert capsys.readouterr().err.count("answer: 4 tokens") == 2


def parts_of(printed):
    """Parameters by part in the table."""
    rows = [line.split() for line in printed.splitlines()]
    names = ("vision_tower", "reducer", "projector", "prefusion", "language_model", "total")
    return {row[0]: int(row[1].replace(",", "")) for row in rows if row and row[0] in names}


def test_info_counts_the_parameters_of_the_real_model(folder, capsys):
    assert run("info", folder) == 0
    model = tiny_engine().model
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts_of(capsys.readouterr().out) == {**counts, "total": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_info_knows_every_preset(name, capsys):
    assert run("info", name, "--frames", 8, "--text-tokens", 20) == 0
    told = capsys.readouterr().out
    model = meta_model(preset(name))
    assert parts_of(told)["total"] == sum(p.numel() for p in model.parameters())
    assert f"{model.config.tokens_per_frame} of {model.config.patches_per_frame} vision tokens per frame" in told
    assert "8 frame(s) and 20 text tokens" in told


def test_info_of_an_unknown_model_lists_the_presets(capsys):
    assert run("info", "llava-maxi") == 2
    told = capsys.readouterr().err
    assert all(name in told for name in PRESETS)


@pytest.mark.parametrize(
    "method", [["prumerge_plus"], ["divprune", "--reducer-tokens", 5], ["fastv", "--reducer-tokens", 1]]
)
def test_a_model_without_reduction_is_converted_to_a_method_without_training_and_answers(tmp_path, capsys, method):
    for part in tiny_parts(fields={"reducer": "identity", "prefusion_num_layers": 0}):
        part.save_pretrained(tmp_path / "all")
    picture().save(tmp_path / "good.png")
    assert run("convert", tmp_path / "all", tmp_path / "few", "--reducer", *method) == 0
    told = [capsys.readouterr().out]
    for name in ("all", "few"):
        assert run("ask", "what?", tmp_path / "good.png", "--model", tmp_path / name, "--max-tokens", 12) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == f"{tmp_path / 'few'}\n"
    assert told[1] != told[2]


def test_convert_and_export_name_what_they_made(folder, tmp_path, capsys):
    assert run("convert", folder, tmp_path / "converted") == 0
    assert run("export", tmp_path / "exported", "--model", folder) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(tmp_path / "converted"), str(tmp_path / "exported")]
    assert told.err == ""
    assert (tmp_path / "exported" / "front_end" / "config.json").exists()
    picture().save(tmp_path / "good.png")
    assert run("ask", "what?", tmp_path / "good.png", "--model", tmp_path / "converted", "--max-tokens", 12) == 0
    assert capsys.readouterr().out == answer(picture(), 12) + "\n"


@pytest.mark.parametrize(
    ("flags", "folder", "choice"),
    [
        ([], "runs/tiny", {}),
        (["--smoke"], "runs/tiny-smoke", {"smoke": True}),
        (["--output", "here", "--minutes", 5, "--slice-minutes", 9], "here", {"minutes": 5.0, "slice_minutes": 9.0}),
        (["--threads", 2, "--workers", 3], "runs/tiny", {"hardware": Hardware(threads=2, workers=3)}),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_train_runs_the_recipe_and_names_the_finished_model(monkeypatch, capsys, flags, folder, choice, finished):
    calls = []

    def train(output, **given):
        calls.append((output, given))
        return {"all": Score(exact=0.9, low=0.8, high=1.0, blind=0.1, questions=9)} if finished else {}

    monkeypatch.setattr(tiny, "train_tiny", train)
    assert run("train", "tiny", "--device", "cpu", *flags) == (0 if finished else 3)
    default = {"smoke": False, "minutes": None, "slice_minutes": None, "hardware": Hardware()}
    assert calls == [(Path(folder), {**default, **choice})]
    assert capsys.readouterr().out == (f"{folder}/model\n" if finished else "")


@pytest.mark.parametrize(
    ("flags", "folder", "choice"),
    [
        ([], "runs/study", {}),
        (["--smoke"], "runs/study-smoke", {"rows": study.SMOKE_ROWS, "num_seeds": 1}),
        (["--smoke", "--seeds", 2], "runs/study-smoke", {"rows": study.SMOKE_ROWS, "num_seeds": 2}),
        (
            ["--rows", "all-tokens", "no-vision", "--seeds", 2],
            "runs/study",
            {"rows": ("all-tokens", "no-vision"), "num_seeds": 2},
        ),
        (["--output", "here", "--slice-minutes", 9], "here", {"slice_minutes": 9.0}),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_train_study_runs_the_rows_that_were_asked_for(monkeypatch, flags, folder, choice, finished):
    calls = []

    def train(output, settings, **given):
        calls.append((output, settings.steps, given))
        return finished

    monkeypatch.setattr(study, "train_study", train)
    steps = 30 if "--smoke" in flags else 1500
    assert run("train", "study", "--device", "cpu", *flags) == (0 if finished else 3)
    default = {"rows": (), "num_seeds": 3, "slice_minutes": None, "hardware": Hardware()}
    assert calls == [(Path(folder), steps, {**default, **choice})]


def test_train_study_prints_the_table_and_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "train_study", None)
    (tmp_path / "start").mkdir()
    assert run("train", "study", "--output", tmp_path, "--table") == 0
    assert capsys.readouterr().out == "No row is done yet.\n"


def test_evaluate_prints_a_table_then_json_and_writes_answers_and_card(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Bench, "questions", 1)  # what a card needs
    model = save_tiny(tmp_path / "model")
    (model / "README.md").write_text(f"A model.\n{card.BEGIN}\n{card.END}\n")
    flags = ("--model", model, "--questions", 1, "--forms", "--json", "--answers", tmp_path / "new" / "answers.jsonl")
    assert run("evaluate", "tiny", *flags, "--write-card") == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["kind", "exact", "95", "%", "interval", "blind", "questions"]
    assert any(line.startswith("colour: colour of a shape") for line in table)
    facts = json.loads(last)
    assert facts["scores"] == read_scores(model)["scores"]
    assert (facts["model"], facts["split"], facts["environment"]["device"][:3]) == (str(model), "test", "cpu")
    assert facts["scores"].keys() >= {"colour", "direction", "images", "clips", "all"}
    answers = [json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == facts["scores"]["all"]["questions"] + len(CAPTION_KINDS)
    assert "| colour | .00 |" in (model / "README.md").read_text()


def test_evaluate_digests_no_weights_when_nothing_tells_them(folder, capsys, monkeypatch):
    monkeypatch.setattr(card, "weights_digest", None)
    monkeypatch.setattr("llava_mini.evaluation.bench.run_bench", lambda *_, **__: MARKS)
    assert run("evaluate", "tiny", "--model", folder, "--questions", 1) == 0
    assert "colour" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--answers", "."], "'.' is a folder. Give the name of a file."),
        (["--answers", "notes.txt/answers.jsonl"], "lies in a file, not in a folder"),
        (["--answers", "notes.txt/far/answers.jsonl"], "lies in a file, not in a folder"),
        (["--answers", "answers.jsonl"], "'answers.jsonl' cannot be written (disk full)"),
        (["--write-card"], "scores.json' cannot be written (disk full)"),
        (["--write-card", "--split", "validation"], "A card needs the test split with at least 100 questions"),
        (["--write-card", "--questions", 99], "but 99 of the test split were asked for"),
    ],
)
def test_what_evaluate_cannot_write_is_told_before_a_model_is_loaded(
    folder, files, capsys, monkeypatch, flags, sentence
):
    def fail(**_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(commands.Engine, "load", None)
    monkeypatch.setattr(commands.tempfile, "TemporaryFile", fail)
    before = sorted(files.iterdir())
    assert run("evaluate", "tiny", "--model", folder, *flags) == 2
    told = capsys.readouterr().err
    assert told.startswith("llava-mini: ")
    assert sentence in told
    assert told.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_images_drawn_faster_than_the_clock_ticks_have_no_rate(tmp_path, monkeypatch, capsys):
    made = Exported(
        folder=tmp_path, num_questions=3, drawn={"image": 1}, seconds=0.1, draw_milliseconds=0.0, processes=1
    )
    monkeypatch.setattr("llava_mini.data.synthetic.export.export_world", lambda *_, **__: made)
    assert run("data", "synth", tmp_path, "--images", 1, "--clips", 0) == 0
    assert "1 files drawn and written" in capsys.readouterr().out


def test_a_destination_that_exists_is_refused(folder, tmp_path, capsys):
    for arguments in (["convert", folder, tmp_path], ["export", tmp_path, "--model", folder]):
        assert run(*arguments) == 2
        assert "exists already" in capsys.readouterr().err


def test_watch_answers_again_and_again_and_tells_what_was_seen(folder, files, capsys):
    flags = ("--model", folder, "--max-tokens", 3, "--every", 2, "--speed", 20)
    assert run("watch", "what?", "film.mp4", *flags) == 0
    told = capsys.readouterr()
    assert re.findall(r"^\[(.*?)\] ", told.out, re.MULTILINE) in (["00:00:00", "00:00:02"], ["00:00:01", "00:00:02"])
    assert told.err.splitlines()[-1] == "(3 frames seen)"
    seen = [frame.image for frame in frames_of(files / "film.mp4", FrameSampling(all_frames=True))][::4]
    assert told.out.endswith(f"[00:00:02] {answer([{'type': 'video', 'video': seen}], 3)}\n")


@pytest.mark.parametrize("flags", [("--window", 2), ("--keep", "seen")])
def test_lines_that_are_typed_while_watching_are_questions_too(folder, files, capsys, monkeypatch, flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \nwhat?\n" + "why? " * 300 + "\nwhere?\n"))
    flags = (*flags, "--model", folder, "--max-tokens", 3, "--every", 60, "--speed", 20)
    assert run("watch", "what?", "film.mp4", *flags) == 0
    told = capsys.readouterr()
    assert told.out.count("[00:00:0") == 4  # at first and at last, and two that were typed
    assert "frames and the question make a prompt of" in told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["what?", "nowhere.mp4"], "no file 'nowhere.mp4'"),
        (["what?", "notes.txt"], "neither an image nor a video"),
        ([" ", "film.mp4"], "question is empty"),
        (["what?", "film.mp4", "--every", 0], "--every takes a number of seconds above 0"),
        (["what?", "film.mp4", "--every", "nan"], "--every takes a number of seconds above 0"),
        (["what?", "film.mp4", "--fps", 0], "fps must be a positive number"),
        (["what?", "film.mp4", "--window", 0], "A window holds at least one frame"),
        (["what?", "film.mp4", "--max-tokens", 0], "max_tokens must be at least 1"),
        (["what?", "film.mp4", "--keep", "notes.txt"], "cannot live in"),
        (["what?", "film.mp4", "--window", 2, "--keep", "seen"], "Give one of the two"),
    ],
)
def test_what_cannot_be_watched_ends_with_2_and_one_sentence(folder, files, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run("watch", *arguments, "--model", folder) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert sentence in told.err
    assert told.err.count("\n") == 1


def test_bench_prints_tables_and_one_line_of_json_that_it_also_writes(tmp_path, capsys):
    output = tmp_path / "new" / "flops.json"
    assert llava_mini_cli.main(["bench", "flops", "--size", "tiny", "--output", str(output)]) == 0
    *tables, line = capsys.readouterr().out.splitlines()
    assert "A later question about the same image" in "\n".join(tables)
    facts = json.loads(line)
    assert (facts["bench"], facts["settings"]["size"]) == ("flops", "tiny")
    assert {"device", "torch", "transformers", "commit"} <= set(facts["environment"])
    assert json.loads(output.read_text()) == facts


def test_bench_refuses_flags_of_other_benchmarks(capsys):
    assert llava_mini_cli.main(["bench", "load", "--warmup", "0", "--hd"]) == 2
    assert "The benchmark load has no --hd. Its settings are: --device, --repeats." in capsys.readouterr().err


def test_bench_refuses_a_file_that_cannot_be_written_before_it_measures(tmp_path, capsys):
    assert llava_mini_cli.main(["bench", "flops", "--output", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "is a folder" in told.err
