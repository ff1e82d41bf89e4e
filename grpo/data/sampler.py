"""Selection of the problems of each step."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.config.errors import ConfigError
from grpo.counter_rng import hash64
from grpo.data.problems import Problem

INSTEAD = 0x696E7374656164  # begins the counters of the orders of later attempts, so that none is that of a noise
WEIGHTED = 0x7765696768746564  # likewise, of the orders by weight


@dataclass(frozen=True)
class SampledProblems:
    """The P problems of a step."""

    problems: list[Problem]
    slots: np.ndarray  # (P,) int64, index of each problem in the step's batch; the sampling noise depends on it


class PromptSampler:
    """Chooses the problems of each step, without random state.

    Without weights, each epoch is a permutation of the problems, determined by (seed, epoch). If the problems have
    different weights, or with a curriculum, each step draws its problems without replacement with probabilities
    proportional to their weights, determined by (seed, step). The curriculum multiplies the weight of a problem by
    `pass_weight` of its pass rate so far, which is the only state.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        seed: int,
        parent: Mapping[str, Any] | None = None,
        curriculum: float = 0.0,
    ) -> None:
        """parent: for a fork, the `parent` of its config, which continues after the parent's problems.

        curriculum: `sampling.curriculum`. Raises ConfigError for weights that are no probabilities.
        """
        if not all(0 <= problem.weight < float("inf") for problem in problems) or not any(p.weight for p in problems):
            raise ConfigError("data: the weights of the training problems must be 0 or more, and not all 0")
        self._problems = problems
        self._seed = seed
        self._parent = parent
        self._curriculum = curriculum
        weights = np.array([problem.weight for problem in problems])
        self._weights = weights if curriculum or len(set(weights.tolist())) > 1 else None  # (number of problems,)
        self._names = [_name(problem) for problem in problems] if curriculum else []
        self._observed: dict[str, tuple[float, int]] = {}  # `_name` -> sum of the pass rates, number of groups

    def take(self, step: int, count: int) -> SampledProblems:
        """The `count` problems of a step (counted from 1). All earlier steps of the run must have the same `count`."""
        if self._weights is not None:
            drawn = np.resize(self._order_by_weight(step), count)
            return SampledProblems([self._problems[place] for place in drawn], np.arange(count))
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
        if self._weights is not None:
            order = self._order_by_weight(step)
        else:
            total = len(self._problems)
            epoch, start = divmod(problems_before(step, count, self._parent), total)
            order = np.roll(epoch_order(total, self._seed, epoch, attempt), -start)
        known = {problem.id for problem in used}
        places = [place for place in order if self._problems[place].id not in known]
        endless = itertools.chain(places, itertools.cycle(order))
        chosen = [self._problems[place] for place in itertools.islice(endless, len(slots))]
        return SampledProblems(chosen, np.asarray(slots))

    def observe(self, problems: Sequence[Problem], pass_rates: Sequence[float]) -> None:
        """Count the results of the groups of a step: for each problem the share of its completions that are right.

        A share of NaN (no completion could be graded) is not counted.
        """
        for problem, rate in zip(problems, pass_rates, strict=True):
            if rate == rate:
                name = _name(problem)
                total, groups = self._observed.get(name, (0.0, 0))
                self._observed[name] = (total + rate, groups + 1)

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as JSON values; empty without a curriculum."""
        return {name: list(counts) for name, counts in self._observed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._observed = {name: (float(total), int(groups)) for name, (total, groups) in state.items()}

    def _order_by_weight(self, step: int) -> np.ndarray:
        """The problems with a weight above 0, in the order in which a step draws them, (at most all,) int64.

        The largest sums of the logarithm of the weight and Gumbel noise are a sample without replacement (Efraimidis
        and Spirakis, 2006).
        """
        assert self._weights is not None
        weights = self._weights
        if self._curriculum:
            observed = (self._observed.get(name, (0.0, 0)) for name in self._names)
            weights = weights * [pass_weight(self._curriculum, total, groups) for total, groups in observed]
        bits = hash64(WEIGHTED, self._seed, step, np.arange(len(weights))) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) / 2.0**53
        with np.errstate(divide="ignore"):
            scores = np.log(weights) - np.log(-np.log(uniform))
        order = np.argsort(-scores, kind="stable")
        return order[weights[order] > 0]


def _name(problem: Problem) -> str:
    """A name of a problem that differs between data sets, whose ids may be equal: a fork can have another one."""
    return hashlib.sha256(f"{problem.id}\n{problem.question}".encode()).hexdigest()[:16]


def pass_weight(curriculum: float, pass_rates: float, groups: int) -> float:
    """The weight of a problem from the sum of its pass rates and their number (groups), in (0, 1].

    1 - c + c * 4 p (1 - p), where c is `sampling.curriculum` and p = (pass_rates + 0.5) / (groups + 1): 1 for a problem
    that was not seen yet or is solved half of the time, and near 1 - c for one that is always or never solved. The
    variance p (1 - p) of right and wrong is the largest signal that a group of completions can have.
    """
    p = (pass_rates + 0.5) / (groups + 1)
    return 1 - curriculum + curriculum * 4 * p * (1 - p)


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
