import random

import pytest

from llava_mini.evaluation.intervals import Z_999, difference, effective_number, wilson


def test_wilson_gives_the_numbers_of_newcombes_table():
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998)
    for hits, questions, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(hits / questions, questions) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_differences_are_the_numbers_of_newcombes_table():
    # R. G. Newcombe, "Interval estimation for the difference": 56/70 - 48/80 by method 10
    assert difference(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference(9 / 10, 10, 3 / 10, 10) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_wilson_holds_the_true_share_about_as_often_as_it_says():
    rng = random.Random(0)
    for share in (0.5, 0.9, 0.98):
        held = 0
        for _ in range(2000):
            hits = sum(rng.random() < share for _ in range(50))
            low, high = wilson(hits / 50, 50)
            held += low <= share <= high
        assert 0.92 < held / 2000 < 0.99


def test_a_wider_level_gives_a_wider_interval():
    low, high = wilson(0.8, 100)
    wide_low, wide_high = wilson(0.8, 100, Z_999)
    assert wide_low < low < high < wide_high


def test_equal_weights_are_worth_their_number_and_unequal_ones_less():
    assert effective_number([0.5] * 8) == pytest.approx(8)
    assert effective_number([1.0, 0.1, 0.1]) < 2


def test_what_is_no_share_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        wilson(1.5, 10)
    with pytest.raises(ValueError, match="at least one question"):
        wilson(0.5, 0)
    with pytest.raises(ValueError, match="weight above 0"):
        effective_number([])
