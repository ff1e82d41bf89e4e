"""The run doctor: simple rules on a run's metrics that report what is wrong and what to change.

Each rule is a function of a `Doctor`, which holds the rows so far. It returns a sentence if it applies, else None. The
rules about correctness and format apply only if the run has components of these names that declare their range.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median, quantiles, stdev
from typing import Any

Row = Mapping[str, Any]
MOST_ROWS = 200  # number of last rows that are kept for the rules


@dataclass(frozen=True)
class Finding:
    """What a rule found, at the step where it first applied."""

    rule: str
    step: int
    text: str  # what is wrong, and what to change


class Doctor:
    """Applies the rules to a run row by row; each rule reports at most once."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """ranges: reward component -> (lowest, highest) value."""
        self.maxima = {name: high for name, (_, high) in ranges.items()}
        self.rows: list[Row] = []
        self.first: list[Row] = []  # the first ten rows, with which later rows are compared
        self.best: list[float] = []  # the rewards of the 20 consecutive rows with the highest mean
        self.evaluations: list[Row] = []  # held-out evaluations in training: step, accuracy (0 to 1), n (problems)
        self.reported: set[str] = set()  # names of the rules that have reported

    def add_evaluation(self, result: Row) -> None:
        """Add the result of an evaluation in training, with its `step`, `accuracy` and `n`."""
        if result["accuracy"] is not None:
            self.evaluations.append({key: result[key] for key in ("step", "accuracy", "n")})

    def check(self, row: Row) -> list[Finding]:
        """Add a row, and return the findings that are new with it."""
        self.rows = [*self.rows[1 - MOST_ROWS :], row]
        self.first = [*self.first, row][:10]
        rewards = self.last("reward", 20)
        if len(rewards) == 20 and (not self.best or fmean(rewards) > fmean(self.best)):
            self.best = rewards
        found = []
        for rule in RULES:
            text = rule(self) if rule.__name__ not in self.reported else None
            if text is not None:
                self.reported.add(rule.__name__)
                found.append(Finding(rule.__name__, row["step"], text))
        return found

    def replay(self, rows: Sequence[Row], evaluations: Iterable[Row]) -> list[Finding]:
        """Check recorded rows, each evaluation before the row of its step, as in the run."""
        waiting = sorted(evaluations, key=lambda each: each["step"])
        found = []
        for row in rows:
            while waiting and waiting[0]["step"] <= row["step"]:
                self.add_evaluation(waiting.pop(0))
            found += self.check(row)
        return found

    def last(self, name: str, count: int, before: int = 0) -> list[float]:
        """The finite values of a metric in the last `count` rows, after removing the last `before` rows."""
        return _values(self.rows[: len(self.rows) - before][-count:], name)


def find_problems(
    rows: Sequence[Row], evaluations: Iterable[Row], ranges: Mapping[str, tuple[float, float]]
) -> list[Finding]:
    """All findings that the doctor would have reported during a run."""
    return Doctor(ranges).replay(rows, evaluations)


def equal_groups(doctor: Doctor) -> str | None:
    """In ten steps every group has equal rewards, so all advantages are zero, and correctness is not near its top."""
    shares = doctor.last("frac_reward_zero_std", 10)
    if len(shares) < 10 or min(shares) < 1 or _at_the_top(doctor):
        return None
    return (
        "in every group all completions had equal rewards for 10 steps, so nothing is learned: use problems that are "
        "neither too hard nor too easy, raise grpo.num_generations or rollout.temperature"
    )


def truncated_completions(doctor: Doctor) -> str | None:
    """More than half of the completions of ten steps were truncated."""
    shares = doctor.last("completions/clipped_ratio", 10)
    if len(shares) < 10 or fmean(shares) <= 0.5:
        return None
    return (
        f"{fmean(shares):.0%} of the completions of 10 steps were truncated, so they are scored "
        "unfinished: raise grpo.max_completion_length, or ask for shorter ones in data.system_prompt"
    )


def reward_falls(doctor: Doctor) -> str | None:
    """The mean reward of twenty steps has lost a third of what it had gained, clearly more than its noise."""
    now = doctor.last("reward", 20)
    best = doctor.best
    start = _values(doctor.first, "reward")
    if len(now) < 20 or len(doctor.rows) < 40 or not start:
        return None
    loss = fmean(best) - fmean(now)
    noise = math.hypot(stdev(now), stdev(best)) / math.sqrt(20)
    within_groups = fmean(doctor.last("reward_group_std", 20) or [0.0])  # the scale of this reward
    if loss < max(6 * noise, (fmean(best) - fmean(start)) / 3, within_groups / 4):
        return None
    return (
        f"the mean reward fell from {fmean(best):.3g} to {fmean(now):.3g}: the policy gets worse; lower optimizer.lr "
        "or grpo.max_grad_norm, and continue from an earlier checkpoint (fork=true fork_step=...)"
    )


def format_without_correctness(doctor: Doctor) -> str | None:
    """The format is nearly always right, but correctness is low and hardly rises, over 120 steps or more."""
    half = min(100, len(doctor.rows) // 2)
    formats = doctor.last("rewards/format/mean", 20)
    now, before = (doctor.last("rewards/correctness/mean", half, gap) for gap in (0, half))
    if half < 60 or len(formats) < 20 or min(len(now), len(before)) < half or "reward_falls" in doctor.reported:
        return None
    if not {"correctness", "format"} <= doctor.maxima.keys():
        return None
    top = doctor.maxima["correctness"]
    rise = fmean(now) - fmean(before)
    noise = math.hypot(stdev(now), stdev(before)) / math.sqrt(half)
    low = fmean(now) < 0.25 * top
    if fmean(formats) < 0.9 * doctor.maxima["format"] or not low or rise + 2 * noise > 0.025 * top:
        return None
    return (
        "the format reward is near its maximum, and correctness is low and does not improve "
        f"({fmean(before):.2g}, then {fmean(now):.2g} of {top:g} over {half} steps each): the easy reward is learned, "
        "the other is not; lower reward.components.format.weight, raise optimizer.lr, or use easier problems"
    )


def kl_runaway(doctor: Doctor) -> str | None:
    """The KL divergence is above 0.5 nats per token and has tripled, or it is above 5 however fast it grows."""
    now = doctor.last("kl", 5)
    before = doctor.last("kl", 20, 30)
    if len(now) < 5 or median(now) < 0.5:
        return None
    growing = len(before) >= 10 and median(now) > 3 * median(before)
    if not growing and median(now) < 5:
        return None
    grows = " and grows" if growing else ""
    return (
        f"KL to the reference is {median(now):.2g} nats per token{grows}: lower optimizer.lr or grpo.max_grad_norm, or "
        "raise grpo.beta"
    )


def entropy_collapse(doctor: Doctor) -> str | None:
    """Entropy fell to a tenth and half of the groups have equal rewards, but correctness is not near its top."""
    now = doctor.last("entropy", 10)
    start = _values(doctor.first, "entropy")
    equal = doctor.last("frac_reward_zero_std", 10)
    if len(doctor.rows) < 20 or min(len(now), len(start), len(equal)) < 10 or _at_the_top(doctor):
        return None
    if fmean(now) > 0.1 * fmean(start) or fmean(equal) < 0.5:
        return None
    return (
        f"entropy fell from {fmean(start):.2g} to {fmean(now):.2g} nats per token and {fmean(equal):.0%} of the groups "
        "are equal: nothing new is tried; go back to an earlier checkpoint with a lower optimizer.lr, or raise "
        "grpo.beta or rollout.temperature"
    )


def gradient_spikes(doctor: Doctor) -> str | None:
    """Three of the last 20 gradient norms were over ten times the usual.

    The usual norm is the upper quartile of the last 100, so that steps without a learning signal do not lower it.
    """
    norms = doctor.last("grad_norm", 20)
    usual = doctor.last("grad_norm", 100)
    if len(usual) < 20:
        return None
    high = quantiles(usual, n=4)[2]
    spikes = sum(norm > 10 * high for norm in norms)
    if spikes < 3 or high == 0:
        return None
    return (
        f"{spikes} of the last 20 gradients were over ten times the usual {high:.2g}: lower grpo.max_grad_norm "
        "towards the usual, or optimizer.lr"
    )


def held_out_falls(doctor: Doctor) -> str | None:
    """The reward rises while held-out accuracy is below its best by more than its noise."""
    if len(doctor.evaluations) < 2:
        return None
    last = doctor.evaluations[-1]
    best = max(doctor.evaluations[:-1], key=lambda each: each["accuracy"])
    noise = math.sqrt(sum(each["accuracy"] * (1 - each["accuracy"]) / each["n"] for each in (last, best)))
    # Each evaluation is compared with the best one before it. The level is divided by a bound on the number of pairs,
    # so that over all evaluations the probability of a false finding is at most 1 %.
    limit = NormalDist().inv_cdf(1 - 0.01 / len(doctor.evaluations) ** 2)
    if best["accuracy"] - last["accuracy"] <= limit * noise:
        return None
    at_best = _values([row for row in doctor.rows if best["step"] - 10 < row["step"] <= best["step"]], "reward")
    now = doctor.last("reward", 10)
    if not at_best or not now or fmean(now) <= fmean(at_best):
        return None
    return (
        f"reward is higher than at step {best['step']}, but held-out accuracy fell from {best['accuracy']:.1%} to "
        f"{last['accuracy']:.1%}: the reward is gamed or the training problems are learned by heart; look at the "
        "completions, and use checkpoints/best"
    )


def skipped_updates(doctor: Doctor) -> str | None:
    """At least 2 of the last 20 updates had a loss or gradient that was not finite."""
    skipped = sum(row.get("loss") is None or row.get("grad_norm") is None for row in doctor.rows[-20:])
    if skipped < 2:
        return None
    return f"{skipped} of the last 20 updates were not finite and changed no weight: lower optimizer.lr"


RULES: tuple[Callable[[Doctor], str | None], ...] = (
    reward_falls,
    equal_groups,
    truncated_completions,
    format_without_correctness,
    kl_runaway,
    entropy_collapse,
    gradient_spikes,
    held_out_falls,
    skipped_updates,
)


def _at_the_top(doctor: Doctor) -> bool:
    """Whether the correctness component of the reward is so near its maximum that little is left to learn."""
    correct = doctor.last("rewards/correctness/mean", 10)
    top = doctor.maxima.get("correctness")
    return top is not None and bool(correct) and fmean(correct) >= 0.9 * top


def _values(rows: Sequence[Row], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]
