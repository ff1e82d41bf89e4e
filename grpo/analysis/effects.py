"""Means over seeds and problems, with intervals that treat both as the random units they are."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, in the unit of its values; the interval is None where nothing could vary."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    problems: int

    @property
    def shown(self) -> bool:
        """Of a difference: whether the interval leaves out that there is none."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def crossed_mean(values: pd.DataFrame) -> Estimate:
    """The mean of values with seeds in rows and problems in columns, such as right (1) or wrong (0), or differences.

    Both are drawn at random: another seed would train another model, another test set would have other problems. So
    the variance of the mean is that of the two-way crossed random-effects model without replication, estimated from
    the mean squares of the analysis of variance,

        (MS_seeds + MS_problems - MS_rest) / (seeds * problems),

    with Satterthwaite's degrees of freedom (Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4;
    Satterthwaite 1946). It is never taken as less than the larger of what seeds alone and problems alone give, which
    errs on the wide side. With one seed, or one column, only the other unit is random.
    """
    table = values.to_numpy(float)
    seeds, problems = table.shape
    mean = float(table.mean())
    if max(seeds, problems) < 2:
        return Estimate(mean, None, None, seeds, problems)
    of_seeds, of_problems = table.mean(axis=1), table.mean(axis=0)
    if min(seeds, problems) == 1:
        sample = of_problems if seeds == 1 else of_seeds
        variance, freedom = sample.var(ddof=1) * min(seeds, problems), len(sample) - 1
    else:
        rest = table - of_seeds[:, None] - of_problems[None, :] + mean
        squares = np.array([problems * of_seeds.var(ddof=1), seeds * of_problems.var(ddof=1)])
        ms_rest = (rest**2).sum() / ((seeds - 1) * (problems - 1))
        terms, freedoms = np.array([*squares, -ms_rest]), [seeds - 1, problems - 1, (seeds - 1) * (problems - 1)]
        variance = terms.sum()
        if variance >= squares.max():
            freedom = variance**2 / (terms**2 / freedoms).sum() if variance > 0 else 1
        else:
            variance, freedom = squares.max(), freedoms[squares.argmax()]
    half = float(stats.t.ppf(0.975, freedom) * np.sqrt(variance / table.size))
    return Estimate(mean, mean - half, mean + half, seeds, problems)
