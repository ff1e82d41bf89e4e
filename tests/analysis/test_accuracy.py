"""Statistics of an evaluation, against numbers worked out by hand, simulation, and scipy."""

import itertools
import random
from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest
from scipy.stats import binomtest

from grpo.analysis.accuracy import majority_share, mcnemar_p, pass_at_k, share_interval, wilson_interval


@pytest.mark.parametrize(
    ("right", "samples", "k", "expected"),
    [
        (0, 4, 2, 0.0),
        (4, 4, 2, 1.0),
        (1, 4, 1, 0.25),
        (1, 4, 2, 0.5),
        (2, 4, 2, 1 - 1 / 6),
        (1, 4, 4, 1.0),
        (3, 10, 5, 1 - 21 / 252),
    ],
)
def test_pass_at_k_is_the_share_of_the_sets_of_k_samples_with_a_right_one(right, samples, k, expected):
    assert pass_at_k(right, samples, k) == pytest.approx(expected)
    outcomes = [True] * right + [False] * (samples - right)
    assert fmean(any(each) for each in itertools.combinations(outcomes, k)) == pytest.approx(expected)


def test_pass_at_k_is_unbiased():
    """Unlike 1 - (1 - right / samples)**k, whose mean is too small."""
    luck = random.Random(1)
    chance, samples, k = 0.2, 5, 3
    estimates = [pass_at_k(sum(luck.random() < chance for _ in range(samples)), samples, k) for _ in range(40_000)]
    assert fmean(estimates) == pytest.approx(1 - (1 - chance) ** k, abs=0.006)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ([1, 1, 2], [True, True, False], 1.0),
        ([1, 2, 2], [True, False, False], 0.0),
        ([1, 2], [True, False], 0.5),  # a tie
        ([1, 2, 3], [False, True, False], pytest.approx(1 / 3)),
        ([None, None, 7], [False, False, True], 1.0),  # no answer is no vote
        ([None, None], [False, False], 0.0),
        ([Fraction(1, 2), Fraction(2, 4), "a"], [True, True, False], 1.0),
    ],
)
def test_the_majority_is_the_most_frequent_answer_and_ties_are_shared(answers, right, expected):
    assert majority_share(answers, right) == expected


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (10, 2), (3, 17), (400, 350)])
def test_mcnemars_p_is_the_binomial_test(gained, lost):
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_p(gained, lost) == pytest.approx(expected)


def test_the_interval_of_shares_is_wilsons_where_all_are_0_or_1_and_else_has_one_more_of_each():
    assert share_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(0.75, 4)
    # With 0 and 1: mean 0.5, sum of squares 0.625, variance 0.125, t quantile of 5 degrees of freedom 2.570582
    half = 2.570582 * (0.125 / 6) ** 0.5
    assert share_interval([0.25, 0.5, 0.5, 0.75]) == pytest.approx([0.5 - half, 0.5 + half], abs=1e-6)
    low, high = share_interval([0.5] * 50)
    assert high - low > 0.05
    assert share_interval([]) is None


def test_the_interval_of_shares_holds_the_true_share_in_about_95_of_100_experiments():
    luck = np.random.default_rng(2)
    held = []
    for _ in range(1000):
        chances = luck.beta(8, 2, size=60)  # of the problems; on average 0.8
        low, high = share_interval(luck.binomial(4, chances) / 4)
        held.append(low <= 0.8 <= high)
    assert 0.93 < fmean(held) < 0.985
