"""Selection of the problems of each step."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.counter_rng import hash64
from grpo.data.problems import Problem

INSTEAD = 0x696E7374656164  # begins the counters of the orders of later attempts, so that none is that of a noise


@dataclass(frozen=True)
class SampledProblems:
    """The P problems of a step."""

    problems: list[Problem]
    slots: np.ndarray  # (P,) int64, index of each problem in the step's batch; the sampling noise depends on it


class PromptSampler:
    """Stateless sampler: each epoch is a permutation of the problems, determined by (seed, epoch)."""

    def __init__(self, problems: Sequence[Problem], seed: int, parent: Mapping[str, Any] | None = None) -> None:
        """parent: for a fork, the `parent` of its config, which continues after the parent's problems."""
        self._problems = problems
        self._seed = seed
        self._parent = parent

    def take(self, step: int, count: int) -> SampledProblems:
        """The `count` problems of a step (counted from 1). All earlier steps of the run must have the same `count`."""
        total = len(self._problems)
        first = problems_before(step, count, self._parent)
        places = range(first, first + count)
        orders = {epoch: epoch_order(total, self._seed, epoch) for epoch in {place // total for place in places}}
        chosen = [self._problems[orders[place // total][place % total]] for place in places]
        return SampledProblems(chosen, np.arange(count))

    def take_instead(
        self, step: int, count: int, slots: Sequence[int], attempt: int, used: Sequence[Problem]
    ) -> SampledProblems:
        """Other problems for some slots of a step; attempt: from 1. count: as for `take`.

        They are the next ones of an order of this attempt that the step has not used, or if there are not enough, the
        next ones. They do not change which problems other steps take.
        """
        total = len(self._problems)
        epoch, start = divmod(problems_before(step, count, self._parent), total)
        order = np.roll(epoch_order(total, self._seed, epoch, attempt), -start)
        known = {problem.id for problem in used}
        places = [place for place in order if self._problems[place].id not in known]
        endless = itertools.chain(places, itertools.cycle(order))
        chosen = [self._problems[place] for place in itertools.islice(endless, len(slots))]
        return SampledProblems(chosen, np.asarray(slots))


def problems_before(step: int, count: int, parent: Mapping[str, Any] | None) -> int:
    """The number of problems that the steps before a step used, `count` each, or for steps of a parent its own count.

    Without `num_problems`, which earlier versions did not record, all steps count as `count` each, as they did there.
    """
    if parent is None or parent.get("num_problems") is None:
        return (step - 1) * count
    return parent["num_problems"] + (step - 1 - parent["step"]) * count


def epoch_order(count: int, seed: int, epoch: int, attempt: int = 0) -> np.ndarray:
    """A permutation of range(count), (count,) int64, determined by (seed, epoch, attempt)."""
    counters = (INSTEAD, attempt, seed, epoch) if attempt else (seed, epoch)
    return np.argsort(hash64(*counters, np.arange(count)), kind="stable")
