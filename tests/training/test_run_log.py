import io

from llava_mini.training.run_log import RunLog, Work, read_log, time_in_words


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


def test_a_line_after_one_that_was_cut_off_is_whole(tmp_path):
    RunLog(tmp_path).path.write_text('{"step": 1}\n{"step": 2, "lo')
    log = RunLog(tmp_path)
    log.write(step=2)
    log.write(step=3)
    assert [line["step"] for line in read_log(log.path)] == [1, 2, 3]


def test_steps_that_were_run_again_count_once(tmp_path):
    log = RunLog(tmp_path)
    for step, loss in ((10, 3.0), (20, 2.0), (10, 3.0), (20, 2.5), (30, 1.0)):
        log.write(phase="vision", step=step, loss=loss)
    log.write(phase="language", step=10, loss=4.0)
    lines = [(line["phase"], line["step"], line["loss"]) for line in read_log(log.path)]
    assert lines == [("vision", 10, 3.0), ("vision", 20, 2.5), ("vision", 30, 1.0), ("language", 10, 4.0)]


def test_progress_tells_the_time_left_and_the_last_step_is_always_shown(tmp_path):
    terminal = io.StringIO()
    log = RunLog(tmp_path, terminal=terminal, every_seconds=1000)
    with log.phase("vision", 0, 100) as progress:
        for step in (10, 20, 100):
            progress(step, 2.0 * step, {"loss": 0.25})
    assert terminal.getvalue().splitlines() == [
        "vision: step 10/100, 3 min 00 s left, loss 0.250",
        "vision: step 100/100, 0 s left, loss 0.250",
    ]


def test_the_time_left_for_the_run_weighs_the_steps_of_the_phases(tmp_path):
    terminal = io.StringIO()
    phases = [Work(name="vision", num_steps=100), Work(name="tuning", num_steps=10, step_cost=3.0)]
    log = RunLog(tmp_path, terminal=terminal, phases=phases)
    assert log.seconds_left() == 0
    with log.phase("vision", 40, 100) as progress:
        progress(50, 100.0, {})
    assert terminal.getvalue() == "vision: step 50/100, 1 min 40 s left (run 2 min 40 s)\n"
    log.spent("vision", 100, 200.0)
    assert log.seconds_left() == 60


def test_a_terminal_shows_a_bar_that_lines_do_not_tear(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    log = RunLog(tmp_path, terminal=terminal)
    with log.phase("vision", 40, 100) as progress:
        progress(41, 82.0, {"loss": 0.25})
        log.say("hello")
        progress(100, 200.0, {"loss": 0.125})
    told = terminal.getvalue()
    assert "vision  40%" in told
    assert "100/100, 0 s left, loss 0.125" in told
    assert "\nhello\n" in told.replace("\r", "\n").replace(" ", "") or "\rhello\n" in told


def test_durations_in_words():
    assert [time_in_words(seconds) for seconds in (12, 200, 3900)] == ["12 s", "3 min 20 s", "1 h 05 min"]
