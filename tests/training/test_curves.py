import sys

import pytest
from PIL import Image

from llava_mini.training.curves import draw_curves

LINES = [
    {
        "time": 1.0,
        "phase": phase,
        "step": step,
        "loss": 2.0 / step,
        "gradient_norm": 1.0,
        "right": {"shape": 0.1 * step},
    }
    for phase in ("vision", "language")
    for step in (1, 2, 3)
]


def test_each_phase_has_a_panel(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(LINES[:3], tmp_path / "one.png")
    draw_curves(LINES, tmp_path / "two.png")
    one, two = (Image.open(tmp_path / f"{name}.png").size for name in ("one", "two"))
    assert two == (2 * one[0], one[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_what_is_no_loss_is_not_drawn_as_one(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves(LINES, tmp_path / "one.png")
    draw_curves([{**line, "rate_share": 0.5, "seconds": 3.0, "damaged": 2} for line in LINES], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_no_lines_draw_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    draw_curves([], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"llava-mini\[train\]"):
        draw_curves(LINES, tmp_path / "curves.png")
