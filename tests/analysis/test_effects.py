import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from grpo.analysis.effects import crossed_mean, paired_difference


def test_the_interval_equals_one_computed_by_hand():
    # Means of the seeds 1, 3; of the problems 1, 2, 3; MS_seeds = 3*2 = 6, MS_problems = 2*1 = 2, MS_rest = 0.
    estimate = crossed_mean(pd.DataFrame([[0, 1, 2], [2, 3, 4]]))
    assert estimate.mean == 2
    freedom = (6 + 2) ** 2 / (6**2 / 1 + 2**2 / 2)
    both, seeds_alone = stats.t.ppf(0.975, freedom) * math.sqrt(8 / 6), stats.t.ppf(0.975, 1) * math.sqrt(6 / 6)
    half = max(both, seeds_alone)
    assert estimate.interval == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert (estimate.seeds, estimate.problems, estimate.excludes_zero) == (2, 3, False)


def test_with_one_seed_or_one_value_per_seed_the_interval_is_that_of_the_paired_t_test():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    for table in (pd.DataFrame([values]), pd.DataFrame(values)):
        estimate = crossed_mean(table)
        assert estimate.interval == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_a_single_value_has_no_interval_and_shows_no_difference():
    estimate = crossed_mean(pd.DataFrame([[0.5]]))
    assert (estimate.mean, estimate.interval, estimate.excludes_zero) == (0.5, None, False)


def test_equal_arms_show_no_difference():
    assert not crossed_mean(pd.DataFrame(np.zeros((3, 40)))).excludes_zero


def test_with_one_seed_a_few_differing_problems_show_no_difference():
    """As in McNemar's exact test: 5 better and 0 worse give p = 0.06, 7 and 0 give p = 0.02."""
    before = pd.DataFrame(np.zeros((1, 200)))
    for better, shown in ((4, False), (5, False), (7, True)):
        after = before.copy()
        after.iloc[0, :better] = 1.0
        estimate = paired_difference(after - before)
        assert (estimate.mean, estimate.excludes_zero) == (better / 200, shown)
        assert (stats.binomtest(better, better).pvalue < 0.05) == shown


def test_an_interval_stays_finite_if_its_terms_nearly_cancel():
    generator = np.random.default_rng(0)
    for _ in range(300):
        table = pd.DataFrame(generator.choice([-1.0, 0.0, 1.0], (3, 200), p=[0.1, 0.8, 0.1]))
        estimate = crossed_mean(table, comparisons=3)
        low, high = estimate.interval
        assert high - low < 2


def test_a_rounding_error_is_not_a_difference():
    assert not crossed_mean(pd.DataFrame([[8.9e-16], [8.9e-16]])).excludes_zero


def test_the_intervals_of_several_comparisons_hold_simultaneously():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    expected = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 4)
    estimate = crossed_mean(pd.DataFrame(values), comparisons=4)
    assert estimate.interval == (pytest.approx(expected.low), pytest.approx(expected.high))


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 0.8])
def test_of_nine_equal_arms_one_is_rarely_called_worse_than_the_best(seeds, of_seeds):
    """Over 5 % are allowed, since the best arm is chosen by its result; uncorrected it would be half of the cases."""
    generator, problems, cases = np.random.default_rng(1), 100, 100
    false = alone = 0
    for _ in range(cases):
        hardness = generator.normal(0, 1.5, (1, 1, problems))
        logits = (
            hardness + generator.normal(0, of_seeds, (9, seeds, 1)) + generator.normal(0, 0.5, (9, seeds, problems))
        )
        arms = (generator.uniform(size=logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
        best, *others = (pd.DataFrame(arm) for arm in sorted(arms, key=lambda arm: -arm.mean()))
        false += any(paired_difference(arm - best, comparisons=8).excludes_zero for arm in others)
        alone += any(paired_difference(arm - best).excludes_zero for arm in others)
    assert false / cases <= 0.15
    assert alone > false


@pytest.mark.parametrize("seeds", [2, 4])
@pytest.mark.parametrize(("of_seeds", "of_problems"), [(0, 0), (0.05, 0.2), (0.2, 0.05)])
def test_without_a_difference_the_interval_contains_zero_in_about_95_of_100_cases(seeds, of_seeds, of_problems):
    """Seeds and problems have random effects; if those of the seeds were ignored, over a fifth would be false."""
    generator, problems, cases = np.random.default_rng(0), 200, 600
    false = naive = 0
    for _ in range(cases):
        table = generator.normal(0, 0.3, (seeds, problems))
        table += generator.normal(0, of_seeds, (seeds, 1)) + generator.normal(0, of_problems, (1, problems))
        false += crossed_mean(pd.DataFrame(table)).excludes_zero
        naive += stats.ttest_1samp(table.mean(axis=0), 0).pvalue < 0.05
    assert false / cases <= 0.075
    if of_seeds > 0:
        assert naive / cases > 0.2
