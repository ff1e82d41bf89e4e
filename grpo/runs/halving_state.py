"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943) over the arms of a sweep, with a budget of time.

All arms take the steps of a first rung; the best of them advance to the next rung, and so on, until the last ones have
taken all steps. A resumed run equals one without an interruption, so no step is computed twice.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.errors import FileError
from grpo.config.overrides import Overrides
from grpo.runs.files import check_record, read_dataclass, write_atomic

LEAST_STEPS = 3  # minimum of the first rung with a budget; also taken first, to measure the time of a step
SEED = "seed"
RUNG = {"steps": int, "scores": dict[str, float], "kept": list[int], "spent_hours": float}  # types of its values
Ladder = list[tuple[int, int]]  # (steps taken by the end of the rung, arms that take them)


@dataclass
class HalvingState:
    """The decisions so far, as stored in halving.json: enough to continue after any interruption."""

    total_steps: int
    arms: list[list[int]]  # the numbers of each arm's jobs, one per seed
    eta: int
    budget_hours: float | None
    step_s: float | None = None  # seconds of a step, as last measured
    start_s: float | None = None  # seconds of a job apart from its steps: loading and evaluating
    ladder: Ladder = field(default_factory=list)
    entered: list[int] | None = None  # arms of the rung in progress
    rungs: list[dict[str, Any]] = field(default_factory=list)  # each: steps, scores by arm, kept arms, hours spent
    state: str = "running"  # running | finished | out of budget

    @classmethod
    def read(cls, folder: Path) -> "HalvingState | None":
        """The record of a sweep folder; None where there is none."""
        file = folder / "halving.json"
        if not file.exists():
            return None
        state: HalvingState = read_dataclass(cls, file)
        numbers = sorted(number for jobs in state.arms for number in jobs)
        if not state.arms or not all(state.arms) or numbers != list(range(len(numbers))):
            raise FileError(f"{file}: arms must hold each job once")
        for rung in state.rungs:
            check_record(rung, RUNG, f"{file}, rungs", needed=RUNG)
        chosen = {"kept": [arm for rung in state.rungs for arm in rung["kept"]], "entered": state.entered or []}
        for name, arms in chosen.items():
            if not set(arms) <= set(range(len(state.arms))):
                raise FileError(f"{file}: {name} has an arm that does not exist")
        return state

    def write(self, folder: Path) -> None:
        """Write halving.json."""
        write_atomic(folder / "halving.json", json.dumps(asdict(self), indent=1) + "\n")

    def seconds(self, ladder: Ladder) -> float:
        """The total time of a ladder's jobs in seconds, from the measured `step_s` and `start_s`."""
        assert self.step_s is not None and self.start_s is not None  # both are measured together
        return seconds(ladder, len(self.arms[0]), self.step_s, self.start_s)

    def affordable(self, alive: list[int], place: int, spent: float) -> list[int]:
        """The first of these arms, as many as the rest of the budget allows in a rung; without a budget all.

        place: the rung, from 0; the first is always run. spent: the seconds that all jobs have taken so far.
        """
        if self.budget_hours is None or place == 0:
            return alive
        steps = self.ladder[place][0] - self.ladder[place - 1][0]
        return alive[: max(0, int((3600 * self.budget_hours - spent) / self.seconds([(steps, 1)])))]

    def summary(self) -> dict[str, Any]:
        """For the report: the time spent, as a share of the full sweep, and each rung."""
        spent = self.rungs[-1]["spent_hours"] if self.rungs else 0.0
        full = self.seconds([(self.total_steps, len(self.arms))]) / 3600 if self.step_s is not None else None
        budget = f" of {self.budget_hours:g}" if self.budget_hours is not None else ""
        text = f"{spent:.2f}{budget} hours of jobs were spent."
        if full:
            text += f" All {len(self.arms)} arms to the end would take about {full:.2f}: {spent / full:.0%} of that."
        if self.state == "out of budget":
            text += " The budget ended before any arm had taken all its steps."
        return {"text": text, "rungs": self.rungs}


def arms_of(points: Sequence[Sequence[str]]) -> list[list[int]]:
    """The numbers of the jobs of each arm. The jobs of an arm differ only in their seed."""
    arms: dict[tuple[str, ...], list[int]] = {}
    for number, point in enumerate(points):
        arms.setdefault(tuple(Overrides(point).without({SEED})), []).append(number)
    return list(arms.values())


def ladder(total_steps: int, arms: int, eta: int, first: int) -> Ladder:
    """The rungs from `first` steps on: each has eta times the steps of the one before and 1/eta of its arms."""
    rungs = []
    steps = first
    left = arms
    while True:
        steps = total_steps if left == 1 else min(steps, total_steps)
        rungs.append((steps, left))
        if steps == total_steps:
            return rungs
        steps = steps * eta
        left = max(1, left // eta)


def seconds(rungs: Ladder, seeds: int, step_s: float, start_s: float) -> float:
    """The total time of a ladder in seconds: each job of a rung starts once, and continues from the rung before."""
    taken = 0
    total = 0.0
    for steps, arms in rungs:
        total += arms * seeds * ((steps - taken) * step_s + start_s)
        taken = steps
    return total


def choose_ladder(record: HalvingState) -> Ladder:
    """Choose the ladder with the longest first rung within the budget.

    Without a budget, choose the first rung such that the last one has fewer than eta arms. Raises ValueError, with the
    smallest sufficient budget in hours, if the budget is too small even for the shortest first rung.
    """
    total = record.total_steps
    arms = len(record.arms)
    if record.budget_hours is None:
        share = float(total)
        left = arms
        while left >= record.eta:
            share = share / record.eta
            left = left // record.eta
        return ladder(total, arms, record.eta, max(1, int(share)))
    firsts = range(total, min(LEAST_STEPS, total) - 1, -1)
    for first in firsts:
        rungs = ladder(total, arms, record.eta, first)
        if record.seconds(rungs) <= 3600 * record.budget_hours:
            return rungs
    least = min(record.seconds(ladder(total, arms, record.eta, first)) for first in firsts)
    raise ValueError(f"{least / 3600:.3g}")


def best_arms(scores: Sequence[float | None], rewards: Sequence[float | None], keep: int) -> list[int]:
    """The `keep` arms with the best scores, best first; of equal scores, the one with the higher mean reward.

    Both have one entry per arm. Arms without a score are dropped.
    """
    scored = [(score, number) for number, score in enumerate(scores) if score is not None]
    ranked = sorted(scored, key=lambda each: (-each[0], -(rewards[each[1]] or 0.0), each[1]))
    return [number for _, number in ranked[:keep]]
