"""Means over seeds and problems, with intervals that treat both as the random units they are."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, in the unit of its values; the interval is None where nothing could vary."""

    mean: float
    interval: tuple[float, float] | None  # its low and its high end
    seeds: int
    problems: int

    @property
    def shown(self) -> bool:
        """Of a difference: whether the interval leaves out that there is none."""
        rounding = 1e-9
        return self.interval is not None and (self.interval[0] > rounding or self.interval[1] < -rounding)


def crossed_mean(values: pd.DataFrame, comparisons: int = 1) -> Estimate:
    """The mean of values with seeds in rows and problems in columns, such as right (1) or wrong (0), or differences.

    Both are drawn at random: another seed would train another model, another test set would have other problems. So
    the variance of the mean is that of the two-way crossed random-effects model without replication, estimated from
    the mean squares of the analysis of variance,

        (MS_seeds + MS_problems - MS_rest) / (seeds * problems),

    with Satterthwaite's degrees of freedom (Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4;
    Satterthwaite 1946). The interval is never narrower than that of the seeds' means alone, or of the problems':
    where two seeds happen to be alike, it would be. With one seed, or one column, only the other unit is random.

    comparisons: how many differences are looked at together; each interval is so wide that all hold at once
    (Bonferroni).
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
            # Where the terms nearly cancel it would go to 0, and the interval to infinity.
            sources.append((variance, max(freedom, min(seeds, problems) - 1)))
    if not sources:
        return Estimate(mean, None, seeds, problems)
    quantile = 1 - 0.025 / comparisons
    half = max(float(stats.t.ppf(quantile, freedom) * np.sqrt(square / table.size)) for square, freedom in sources)
    return Estimate(mean, (mean - half, mean + half), seeds, problems)


def paired_difference(difference: pd.DataFrame, comparisons: int = 1) -> Estimate:
    """The mean of differences between equal problems and seeds, with seeds in rows and problems in columns.

    With one seed, one more problem is counted on each side: with few differing problems the plain interval is too
    narrow (as Agresti and Caffo, The American Statistician 54, 2000, do for proportions).
    """
    estimate = crossed_mean(difference, comparisons)
    if estimate.seeds > 1 or estimate.problems < 2:
        return estimate
    wider = crossed_mean(difference.assign(one=1.0, other=-1.0), comparisons)
    assert wider.interval is not None  # it has more than one problem
    low, high = wider.interval
    half = (high - low) / 2
    return replace(estimate, interval=(estimate.mean - half, estimate.mean + half))
