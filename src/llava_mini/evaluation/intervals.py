"""How sure a share of right answers is: intervals for shares and for their differences.

Wilson's interval is formula 4 of E. B. Wilson, "Probable inference, the law of succession, and statistical
inference", Journal of the American Statistical Association 22 (1927), 209-212. The interval of a difference is
method 10 of R. G. Newcombe, "Interval estimation for the difference between independent proportions", Statistics in
Medicine 17 (1998), 873-890.

Both are made for answers that are right or wrong. For marks between 0 and 1 they are wider than they need be, because
no such marks vary more than those of right and wrong answers with the same mean.
"""

from collections.abc import Sequence
from math import sqrt

Z_95 = 1.959964
"""Half-width of the middle 95 % of a normal distribution, in standard deviations."""
Z_999 = 3.290527
"""The same for 99.9 %."""


def wilson(share: float, questions: float, z: float = Z_95) -> tuple[float, float]:
    """Return the interval that holds the true share, both ends between 0 and 1.

    Args:
        share: Share of right answers, 0 to 1.
        questions: How many were asked; for a weighted mean, the effective number.
        z: Half-width in standard deviations; 95 % by default.

    Raises:
        ValueError: The share is not between 0 and 1, or nothing was asked.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"A share lies between 0 and 1, got {share}.")
    if questions <= 0:
        raise ValueError(f"An interval needs at least one question, got {questions}.")
    shrink = 1 / (1 + z * z / questions)
    middle = shrink * (share + z * z / (2 * questions))
    reach = shrink * z * sqrt(share * (1 - share) / questions + (z / (2 * questions)) ** 2)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def difference(
    first: float, first_questions: float, second: float, second_questions: float, z: float = Z_95
) -> tuple[float, float]:
    """Return the interval of the difference ``first - second`` of two shares from different questions.

    Args:
        first: The first share.
        first_questions: How many questions it comes from.
        second: The second share.
        second_questions: How many questions it comes from.
        z: Half-width in standard deviations; 95 % by default.

    Raises:
        ValueError: As in ``wilson``.
    """
    low_1, high_1 = wilson(first, first_questions, z)
    low_2, high_2 = wilson(second, second_questions, z)
    below = sqrt((first - low_1) ** 2 + (high_2 - second) ** 2)
    above = sqrt((high_1 - first) ** 2 + (second - low_2) ** 2)
    return first - second - below, first - second + above


def effective_number(weights: Sequence[float]) -> float:
    """Return how many equally weighted questions a weighted mean is worth: (sum of w)^2 / (sum of w^2).

    The formula is that of L. Kish, "Survey Sampling" (1965). It leaves out what is gained by asking each kind of
    question separately, so intervals made with it are a little too wide.

    Args:
        weights: One of each question, not negative.
    """
    squares = sum(weight * weight for weight in weights)
    if squares == 0:
        raise ValueError("A weighted mean needs at least one question of a weight above 0.")
    return sum(weights) ** 2 / squares
