"""Selection of the problems of each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo.counter_rng import hash64
from grpo.data.problems import Problem


@dataclass(frozen=True)
class SampledProblems:
    """The P problems of a step."""

    problems: list[Problem]
    slots: np.ndarray  # (P,) int64, index of each problem in the step's batch; the sampling noise depends on it


class PromptSampler:
    """Stateless sampler: each epoch is a permutation of the problems, determined by (seed, epoch)."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._problems = problems
        self._seed = seed

    def take(self, step: int, count: int) -> SampledProblems:
        """The `count` problems of a step (counted from 1). All earlier steps must have used the same `count`."""
        total = len(self._problems)
        first = (step - 1) * count
        places = range(first, first + count)
        orders = {epoch: epoch_order(total, self._seed, epoch) for epoch in {place // total for place in places}}
        chosen = [self._problems[orders[place // total][place % total]] for place in places]
        return SampledProblems(chosen, np.arange(count))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), (count,) int64, determined by (seed, epoch)."""
    return np.argsort(hash64(seed, epoch, np.arange(count)), kind="stable")
