"""Which problems a step sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.counter_rng import hash64
from grpo.data.problems import Problem


@dataclass(frozen=True)
class SampledProblems:
    """P problems of a step."""

    problems: list[Problem]
    slots: np.ndarray  # (P,) int64, their places in the step's whole batch, which the sampling noise follows from


class PromptSampler:
    """Each epoch is a permutation of the problems that follows from (seed, epoch). It has no state."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = problems
        self._seed = seed

    def take(self, step: int, count: int) -> SampledProblems:
        """The `count` problems of a step (from 1), where every step before it took as many."""
        total = len(self._problems)
        first = (step - 1) * count
        places = range(first, first + count)
        orders = {epoch: epoch_order(total, self._seed, epoch) for epoch in {place // total for place in places}}
        chosen = [self._problems[orders[place // total][place % total]] for place in places]
        return SampledProblems(chosen, np.arange(count))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), the same wherever and whenever it is asked for."""
    return np.argsort(hash64(seed, epoch, np.arange(count)), kind="stable")
