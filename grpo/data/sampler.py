"""Selection of the problems of each step."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo.config.errors import ConfigError
from grpo.counter_rng import hash64
from grpo.data.problems import Problem

INSTEAD = 0x696E7374656164  # begins the counters of the orders of later attempts, so that none is that of a noise
WEIGHTED = 0x7765696768746564  # likewise, of the orders by weight
PARTS = 0x7061727473  # likewise, of the parts of a mixture


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
    `pass_weight` of its pass rate so far, which is the only state. Of a mixture, each slot draws its part first, so
    that a small part comes as often as its weight says; its problems then repeat within a step if there are too few.
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
        weights = weights / weights.max()  # so that their sum cannot overflow
        is_weighted = bool(curriculum) or len(set(weights.tolist())) > 1 or len({each.part for each in problems}) > 1
        self._weights = weights if is_weighted else None  # (number of problems,)
        # The number of each problem's part, (number of problems,), and the share of each part, (number of parts,).
        self._part = np.unique([problem.part for problem in problems], return_inverse=True)[1]
        self._shares = np.bincount(self._part, weights) / weights.sum()
        self._names = [_name(problem) for problem in problems] if curriculum else []
        self._observed: dict[str, tuple[float, int]] = {}  # `_name` -> sum of the pass rates, number of groups

    def take(self, step: int, count: int) -> SampledProblems:
        """The `count` problems of a step (counted from 1). All earlier steps of the run must have the same `count`."""
        if self._weights is not None:
            return self._take_by_weight(step, np.arange(count))
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

        They are the next ones of an order that the step has not used, or if there are not enough, the next ones. The
        order is one of this attempt; by weight it is that of the step, and in a mixture that of the slot's part. Other
        steps take the same problems as without this.
        """
        if self._weights is not None:
            return self._take_by_weight(step, np.asarray(slots), used)
        total = len(self._problems)
        epoch, start = divmod(problems_before(step, count, self._parent), total)
        order = np.roll(epoch_order(total, self._seed, epoch, attempt), -start)
        endless = self._unused_first(order, used)
        chosen = [self._problems[place] for place in itertools.islice(endless, len(slots))]
        return SampledProblems(chosen, np.asarray(slots))

    def _take_by_weight(self, step: int, slots: np.ndarray, used: Sequence[Problem] = ()) -> SampledProblems:
        """Problems for some slots (n,) of a step; those that it has used only if there are not enough others."""
        order = self._order_by_weight(step)
        parts = np.searchsorted(self._shares.cumsum(), _uniform(PARTS, self._seed, step, slots), side="right")
        parts = parts.clip(max=self._shares.nonzero()[0][-1])  # the sum of the shares may be rounded to less than 1
        endless = {part: self._unused_first(order[self._part[order] == part], used) for part in set(parts.tolist())}
        return SampledProblems([self._problems[next(endless[part])] for part in parts.tolist()], slots)

    def _unused_first(self, order: np.ndarray, used: Sequence[Problem]) -> Iterator[int]:
        """The places of an order whose problems are not used, then all of them again and again."""
        if not used:
            return itertools.cycle(order)
        known = {problem.id for problem in used}
        places = [place for place in order if self._problems[place].id not in known]
        return itertools.chain(places, itertools.cycle(order))

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
        uniform = _uniform(WEIGHTED, self._seed, step, np.arange(len(weights)))
        with np.errstate(divide="ignore"):
            scores = np.log(weights) - np.log(-np.log(uniform))
        order = np.argsort(-scores, kind="stable")
        return order[weights[order] > 0]


def _uniform(*counters: int | np.ndarray) -> np.ndarray:
    """Uniform float64 numbers between 0 and 1, both excluded, determined by the counters, like `hash64`."""
    return ((hash64(*counters) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


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
