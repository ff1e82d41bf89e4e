"""Means over seeds and problems, with intervals that treat both as random samples."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # the t distribution's quantile; scipy.stats takes a second to import


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, in the unit of the values; no interval for one seed and one problem."""

    mean: float
    interval: tuple[float, float] | None  # (low, high)
    seeds: int
    problems: int

    @property
    def excludes_zero(self) -> bool:
        """For a difference: whether its interval excludes zero."""
        rounding = 1e-9
        return self.interval is not None and (self.interval[0] > rounding or self.interval[1] < -rounding)


def crossed_mean(values: pd.DataFrame, comparisons: int = 1) -> Estimate:
    """The mean of values with seeds in rows and problems in columns, such as right (1) or wrong (0), or differences.

    Both are random: another seed would train another model, and another test set would have other problems. So the
    variance of the mean is that of the two-way crossed random-effects model without replication, estimated from the
    mean squares of the analysis of variance,

        (MS_seeds + MS_problems - MS_rest) / (seeds * problems),

    with Satterthwaite's degrees of freedom (Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4;
    Satterthwaite 1946). The interval is never narrower than the one from the means of the seeds alone or from the
    means of the problems alone; without this limit it could be, for example if two seeds happen to agree. With one
    seed only the problems are random, and with one column only the seeds.

    comparisons: number of differences that are reported together; each interval is widened so that all of them hold
    simultaneously (Bonferroni).
    """
    table = values.to_numpy(float)
    seeds, problems = table.shape
    mean = float(table.mean())
    of_seeds = table.mean(axis=1)
    of_problems = table.mean(axis=0)
    sources = []  # mean square, degrees of freedom
    if seeds > 1:
        sources.append((problems * of_seeds.var(ddof=1), seeds - 1))
    if problems > 1:
        sources.append((seeds * of_problems.var(ddof=1), problems - 1))
    if len(sources) == 2:
        rest = table - of_seeds[:, None] - of_problems[None, :] + mean
        freedom = (seeds - 1) * (problems - 1)
        terms = [*sources, (-(rest**2).sum() / freedom, freedom)]
        variance = sum(square for square, _ in terms)
        if variance > 0:
            freedom = variance**2 / sum(square**2 / freedom for square, freedom in terms)
            # If the terms nearly cancel, the degrees of freedom would go to 0, and the interval to infinity.
            sources.append((variance, max(freedom, min(seeds, problems) - 1)))
    if not sources:
        return Estimate(mean, None, seeds, problems)
    quantile = 1 - 0.025 / comparisons
    half = max(float(stdtrit(freedom, quantile) * np.sqrt(square / table.size)) for square, freedom in sources)
    return Estimate(mean, (mean - half, mean + half), seeds, problems)


def paired_difference(difference: pd.DataFrame, comparisons: int = 1) -> Estimate:
    """The mean of differences paired by problem and seed, with seeds in rows and problems in columns.

    With one seed, the interval is computed with one more problem of difference 1 and one of -1, since it would be too
    narrow if few problems differ. Bonett and Price (Journal of Educational and Behavioral Statistics 37, 2012) adjust
    the interval of a difference of paired proportions in this way; here its centre stays the observed difference, and
    the quantile is that of the t distribution.
    """
    estimate = crossed_mean(difference, comparisons)
    if estimate.seeds > 1 or estimate.problems < 2:
        return estimate
    wider = crossed_mean(difference.assign(one=1.0, other=-1.0), comparisons)
    assert wider.interval is not None  # it has more than one problem
    low, high = wider.interval
    half = (high - low) / 2
    return replace(estimate, interval=(estimate.mean - half, estimate.mean + half))
