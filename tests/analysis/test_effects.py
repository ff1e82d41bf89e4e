import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from grpo.analysis.effects import crossed_mean


def test_a_table_worked_out_by_hand():
    # Means of seeds 1, 3; of problems 1, 2, 3; MS_seeds = 3*2 = 6, MS_problems = 2*1 = 2, MS_rest = 0.
    estimate = crossed_mean(pd.DataFrame([[0, 1, 2], [2, 3, 4]]))
    assert estimate.mean == 2
    freedom = (6 + 2) ** 2 / (6**2 / 1 + 2**2 / 2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt((6 + 2) / 6)
    assert (estimate.low, estimate.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert (estimate.seeds, estimate.problems, estimate.shown) == (2, 3, False)


def test_with_one_seed_or_one_number_a_seed_it_is_the_paired_t_interval():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    for table in (pd.DataFrame([values]), pd.DataFrame(values)):
        estimate = crossed_mean(table)
        assert (estimate.low, estimate.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_one_number_has_no_interval_and_shows_nothing():
    estimate = crossed_mean(pd.DataFrame([[0.5]]))
    assert (estimate.mean, estimate.low, estimate.shown) == (0.5, None, False)


def test_equal_arms_show_no_difference():
    assert not crossed_mean(pd.DataFrame(np.zeros((3, 40)))).shown


@pytest.mark.parametrize(("of_seeds", "of_problems"), [(0, 0), (0.05, 0.2), (0.2, 0.05)])
def test_where_there_is_no_difference_the_interval_says_so_in_about_95_of_100_cases(of_seeds, of_problems):
    """Seeds and problems have effects of their own; without those of seeds, a fifth and more would be false."""
    generator, seeds, problems, cases = np.random.default_rng(0), 4, 200, 600
    false = naive = 0
    for _ in range(cases):
        table = generator.normal(0, 0.3, (seeds, problems))
        table += generator.normal(0, of_seeds, (seeds, 1)) + generator.normal(0, of_problems, (1, problems))
        false += crossed_mean(pd.DataFrame(table)).shown
        naive += stats.ttest_1samp(table.mean(axis=0), 0).pvalue < 0.05
    assert 0.005 <= false / cases <= 0.09
    if of_seeds > 0:
        assert naive / cases > 0.2
