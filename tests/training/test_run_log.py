import io

from llava_mini.training.run_log import RunLog, read_log, time_in_words


def test_lines_are_appended_and_read_back(tmp_path):
    for step in (1, 2):
        RunLog(tmp_path / "run").write(phase="vision", step=step, loss=0.5)
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [(line["phase"], line["step"], line["loss"]) for line in lines] == [("vision", 1, 0.5), ("vision", 2, 0.5)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    log = RunLog(tmp_path)
    log.write(step=1)
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_log(log.path)] == [1]


def test_progress_tells_the_time_left_and_the_last_step_is_always_shown(tmp_path):
    terminal = io.StringIO()
    log = RunLog(tmp_path, terminal=terminal, every_seconds=1000)
    for step in (10, 20, 100):
        log.progress("vision", step, 100, 2.0, {"loss": 0.25})
    assert terminal.getvalue().splitlines() == [
        "vision: step 10/100, 3 min 00 s left, loss 0.250",
        "vision: step 100/100, 0 s left, loss 0.250",
    ]


def test_durations_in_words():
    assert [time_in_words(seconds) for seconds in (12, 200, 3900)] == ["12 s", "3 min 20 s", "1 h 05 min"]
