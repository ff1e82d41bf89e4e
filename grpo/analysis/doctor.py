"""The run doctor: simple rules on a run's metrics that report what is wrong and what to change.

Each rule is a function of a `Doctor`, which holds the rows so far. It returns a sentence if it applies, else None. The
rules about correctness and format apply only if the run has components of these names that declare their range.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, median, quantiles, stdev
from typing import Any

Row = Mapping[str, Any]
MOST_ROWS = 200  # number of last rows that are kept for the rules
# The largest mean difference in nats per token between the log-probabilities of sampling and of training that rounding
# explains, by the dtype of the computation. Two ways to compute the same number differ by 1e-7 to 1e-4 in float32, and
# by 1e-3 to 5e-2 in the narrower dtypes (SmolLM2-135M on an Intel Xeon: 4e-6 in float32, 4e-2 in bfloat16).
MOST_ROUNDING = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.1}


@dataclass(frozen=True)
class Finding:
    """What a rule found, at the step where it first applied."""

    rule: str
    step: int
    text: str  # what is wrong, and what to change


class Doctor:
    """Applies the rules to a run row by row; each rule reports at most once."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]], dtype: str | None = None) -> None:
        """ranges: reward component -> (lowest, highest) value. dtype: of the computation; None: unknown."""
        self.maxima = {name: high for name, (_, high) in ranges.items()}
        self.dtype = dtype
        self.rows: list[Row] = []
        self.first: list[Row] = []  # the first ten rows, with which later rows are compared
        self.best: list[float] = []  # the rewards of the 20 consecutive rows with the highest mean
        self.evaluations: list[Row] = []  # split, step, accuracy (0 to 1), n (problems), reward (in training)
        self.reported: set[str] = set()  # names of the rules that have reported

    def add_evaluation(self, result: Row) -> list[Finding]:
        """Add the result of an evaluation, with its `step`, `accuracy` and `n`; return the findings that are new."""
        if result["accuracy"] is not None:
            rewards = self.last("reward", 10)
            reward = fmean(rewards) if rewards else None
            self.evaluations.append(
                {key: result[key] for key in ("split", "step", "accuracy", "n")} | {"reward": reward}
            )
        return self._findings(result["step"])

    def check(self, row: Row) -> list[Finding]:
        """Add a row, and return the findings that are new with it."""
        self.rows = [*self.rows[1 - MOST_ROWS :], row]
        self.first = [*self.first, row][:10]
        rewards = self.last("reward", 20)
        if len(rewards) == 20 and (not self.best or fmean(rewards) > fmean(self.best)):
            self.best = rewards
        return self._findings(row["step"])

    def _findings(self, step: int) -> list[Finding]:
        found = []
        for rule in RULES:
            text = rule(self) if rule.__name__ not in self.reported else None
            if text is not None:
                self.reported.add(rule.__name__)
                found.append(Finding(rule.__name__, step, text))
        return found

    def replay(self, rows: Sequence[Row], evaluations: Iterable[Row]) -> list[Finding]:
        """Check recorded rows, each evaluation before the row of its step, as in the run."""
        waiting = sorted(evaluations, key=lambda each: each["step"])
        found = []
        for row in rows:
            while waiting and waiting[0]["step"] <= row["step"]:
                found += self.add_evaluation(waiting.pop(0))
            found += self.check(row)
        return found

    def last(self, name: str, count: int, before: int = 0) -> list[float]:
        """The finite values of a metric in the last `count` rows, after removing the last `before` rows."""
        return _values(self.rows[: max(0, len(self.rows) - before)][-count:], name)


def find_problems(
    rows: Sequence[Row],
    evaluations: Iterable[Row],
    ranges: Mapping[str, tuple[float, float]],
    dtype: str | None = None,
) -> list[Finding]:
    """All findings that the doctor would have reported during a run."""
    return Doctor(ranges, dtype).replay(rows, evaluations)


def dtype_of(config: Mapping[str, Any]) -> str | None:
    """The dtype in which a run with this config computes; None if the config does not say."""
    compute = (config.get("hardware") or {}).get("compute_dtype")
    return compute or (config.get("model") or {}).get("dtype")


def equal_groups(doctor: Doctor) -> str | None:
    """In ten or more steps in a row every group had equal rewards, and correctness is not near its top.

    With few groups per step this also happens by chance in a run that learns, so the number of steps must not be
    explained by how often there was a signal before them.
    """
    without = [share == 1 for share in doctor.last("frac_reward_zero_std", MOST_ROWS)]
    streak = next((count for count, each in enumerate(reversed(without)) if not each), len(without))
    before = without[: len(without) - streak]
    chance = (before.count(True) + 1) / (len(before) + 2)  # of a step without a signal
    if streak < 10 or (streak < 100 and len(without) * chance**streak > 0.01) or _at_the_top(doctor):
        return None
    return (
        f"in every group all completions had equal rewards for {streak} steps, so these steps taught nothing: use "
        "problems that are neither too hard nor too easy, raise grpo.num_generations or rollout.temperature"
    )


def truncated_completions(doctor: Doctor) -> str | None:
    """More than half of the completions of ten steps were truncated, clearly more than the noise of these steps."""
    shares = doctor.last("completions/clipped_ratio", 10)
    if len(shares) < 10 or fmean(shares) - 3 * stdev(shares) / math.sqrt(10) <= 0.5:
        return None
    start = _values(doctor.first, "completions/clipped_ratio")
    text = f"{fmean(shares):.0%} of the completions of 10 steps were truncated"
    if fmean(start) < 0.25:
        return (
            f"{text}, {fmean(start):.0%} at the start: the policy has changed; lower optimizer.lr if the reward falls, "
            "else raise grpo.max_completion_length"
        )
    return (
        f"{text}, so they are scored unfinished: raise grpo.max_completion_length, or ask for shorter ones in "
        "data.system_prompt"
    )


def reward_falls(doctor: Doctor) -> str | None:
    """The mean reward of twenty steps has lost a third of what it had gained, clearly more than its noise."""
    now = doctor.last("reward", 20)
    best = doctor.best
    start = _values(doctor.first, "reward")
    if len(now) < 20 or len(doctor.rows) < 40 or not start:
        return None
    loss = fmean(best) - fmean(now)
    noise = _noise(doctor.last("reward", MOST_ROWS)) * math.sqrt(2 / 20)
    rounding = 1e-6 * max(abs(reward) for reward in best)
    within_groups = fmean(doctor.last("reward_group_std", 20) or [0.0])  # the scale of this reward
    if loss <= max(6 * noise, (fmean(best) - fmean(start)) / 3, within_groups / 4, rounding):
        return None
    return (
        f"the mean reward fell from {fmean(best):.3g} to {fmean(now):.3g}: the policy gets worse; lower optimizer.lr "
        "or grpo.max_grad_norm, and start again, or fork from an earlier checkpoint (fork=true fork_step=...; "
        "checkpoint.keep_every keeps them)"
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
    improves = rise > 2 * noise or rise + 2 * noise > 0.025 * top
    if fmean(formats) < 0.9 * doctor.maxima["format"] or not low or improves:
        return None
    return (
        "the format reward is near its maximum, and correctness is low and hardly improves "
        f"({fmean(before):.2g}, then {fmean(now):.2g} of {top:g} over {half} steps each): the easy reward is learned, "
        "the other is not; lower reward.components.format.weight, raise optimizer.lr, or use easier problems"
    )


def kl_runaway(doctor: Doctor) -> str | None:
    """The KL divergence is above 0.5 nats per token, has tripled and still grows, or it is above 5 in any case."""
    now = doctor.last("kl", 5)
    lately = doctor.last("kl", 10, 15)
    before = doctor.last("kl", 20, 30)
    if len(now) < 5 or median(now) < 0.5:
        return None
    growing = len(before) >= 10 and median(now) > 3 * median(before) and median(now) > 1.3 * median(lately)
    if not growing and median(now) < 5:
        return None
    grows = " and grows" if growing else ""
    return (
        f"KL to the reference is {median(now):.2g} nats per token{grows}: lower optimizer.lr or grpo.max_grad_norm, or "
        "raise grpo.beta"
    )


def entropy_collapse(doctor: Doctor) -> str | None:
    """Entropy fell to a tenth and half of the groups have equal rewards, but correctness is not near its top.

    The entropy of each step must be below the usual one at the start: it differs between problems, and with few
    problems per step some ten steps have easy problems only.
    """
    now = doctor.last("entropy", 20)
    start = _values(doctor.first, "entropy")
    equal = doctor.last("frac_reward_zero_std", 20)
    if len(doctor.rows) < 30 or min(len(now), len(equal)) < 20 or len(start) < 10 or _at_the_top(doctor):
        return None
    if fmean(now) > 0.1 * fmean(start) or max(now) > median(start) or fmean(equal) < 0.5:
        return None
    return (
        f"entropy fell from {fmean(start):.2g} to {fmean(now):.2g} nats per token and {fmean(equal):.0%} of the groups "
        "are equal: nothing new is tried; go back to an earlier checkpoint with a lower optimizer.lr, or raise "
        "grpo.beta or rollout.temperature"
    )


def gradient_spikes(doctor: Doctor) -> str | None:
    """Three of the last 20 gradient norms were over ten times the largest usual one, of the steps with a signal.

    The largest usual norm is the 95th percentile of the 100 before them: a policy that is nearly always right has a
    large gradient whenever it makes a mistake. Steps in which all groups have equal rewards are left out: their
    gradient is that of the KL penalty only, or 0.
    """
    rows = [row for row in doctor.rows if row.get("frac_reward_zero_std") != 1]
    norms = _values(rows, "grad_norm")
    before = norms[-120:-20]
    if len(before) < 20:
        return None
    usual = quantiles(before, n=20)[-1]
    spikes = sum(norm > 10 * usual for norm in norms[-20:])
    if spikes < 3 or usual == 0:
        return None
    return (
        f"{spikes} of the last 20 gradients of steps with a signal were over ten times larger than nearly all before "
        f"({usual:.2g}): lower optimizer.lr, or grpo.max_grad_norm towards {usual:.2g}"
    )


def held_out_falls(doctor: Doctor) -> str | None:
    """The reward rises while validation or test accuracy is below its best by more than its noise."""
    evaluations = [each for each in doctor.evaluations if each["split"] == doctor.evaluations[-1]["split"]]
    if len(evaluations) < 2:
        return None
    last = evaluations[-1]
    best = max(evaluations[:-1], key=lambda each: each["accuracy"])
    noise = math.sqrt(sum(each["accuracy"] * (1 - each["accuracy"]) / each["n"] for each in (last, best)))
    # Each evaluation is compared with the best one before it. The level is divided by a bound on the number of pairs,
    # so that over all evaluations the probability of a false finding is at most 1 %.
    limit = NormalDist().inv_cdf(1 - 0.01 / len(doctor.evaluations) ** 2)
    if best["accuracy"] - last["accuracy"] <= limit * noise:
        return None
    now = doctor.last("reward", 10)
    first = _values(doctor.first, "reward")  # for the evaluation before training
    at_best = first if best["reward"] is None else [best["reward"]]
    if not now or not at_best or fmean(now) <= fmean(at_best):
        return None
    return (
        f"reward is higher than at step {best['step']}, but {last['split']} accuracy fell from {best['accuracy']:.1%} "
        f"to {last['accuracy']:.1%}: the reward is gamed or the training problems are learned by heart; look at the "
        "completions in the report, and use the weights of checkpoints/best (eval.every, then checkpoint=best)"
    )


def skipped_updates(doctor: Doctor) -> str | None:
    """At least 2 of the last 20 updates had a loss or gradient that was not finite."""
    skipped = sum(row.get("loss") is None or row.get("grad_norm") is None for row in doctor.rows[-20:])
    if skipped < 2:
        return None
    return f"{skipped} of the last 20 updates were not finite and changed no weight: lower optimizer.lr"


def sampling_differs(doctor: Doctor) -> str | None:
    """In two steps in a row the log-probabilities of sampling and training differ by more than rounding explains."""
    differences = doctor.last("sampling/logp_difference/mean", 2)
    limit = MOST_ROUNDING.get(str(doctor.dtype), max(MOST_ROUNDING.values()))
    if len(differences) < 2 or min(differences) <= limit:
        return None
    rounding = f"rounding in {doctor.dtype}" if doctor.dtype in MOST_ROUNDING else "rounding"
    return (
        f"the log-probabilities of the same tokens in sampling and training differ by {differences[-1]:.2g} nats per "
        f"token, more than {rounding} explains (at most {limit:g}): a rollout engine of your own must compute in the "
        "same dtype, and load the current weights in sync(); with rollout=native try model.attn_implementation=eager, "
        "or another model.name"
    )


def weights_did_not_move(doctor: Doctor) -> str | None:
    """In five updates in a row with a gradient and a learning rate above 0, none of the looked-at weights changed."""
    updates = [row for row in doctor.rows if (row.get("grad_norm") or 0) > 0 and (row.get("learning_rate") or 0) > 0]
    changed = [row.get("weights_changed") for row in updates[-5:]]
    if len(changed) < 5 or any(each != 0 for each in changed):
        return None
    return (
        "the last 5 updates had a gradient and changed no weight: raise optimizer.lr, whose steps are rounded away, or "
        "set model.dtype=float32"
    )


def memory_grows(doctor: Doctor) -> str | None:
    """The peak of memory grew in each quarter of the last 100 steps, not more slowly in the last, and lengths did not.

    At least 1 % in each quarter. Longer completions than before need more memory in any case.
    """
    peaks = doctor.last("perf/peak_memory_gb", 101)
    longest = doctor.last("completions/max_length", 100)
    lengths = doctor.last("completions/mean_length", 100)
    if len(peaks) < 101 or min(len(longest), len(lengths)) < 100:
        return None
    quarters = [after - before for before, after in pairwise(peaks[::25])]
    if min(quarters) < 0.01 * peaks[0] or quarters[-1] < 0.5 * fmean(quarters):
        return None
    if max(longest[25:]) > max(longest[:25]) or fmean(lengths[-25:]) > 1.05 * fmean(lengths[:25]):
        return None
    return (
        f"memory grew from {peaks[0]:.3g} to {peaks[-1]:.3g} GB in 100 steps and still grows, though completions are "
        "not longer: something keeps what it should release; look at functions of your own in objective, rollout and "
        "reward.components, and resume the run in a new process before memory runs out"
    )


def component_without_values(doctor: Doctor) -> str | None:
    """A reward component gave no value for any completion of the first ten steps or more."""
    if len(doctor.rows) < 10:
        return None
    names = [name.split("/")[1] for name in doctor.rows[-1] if name.startswith("rewards/") and name.endswith("/mean")]
    silent = [name for name in names if all(row.get(f"rewards/{name}/mean") is None for row in doctor.rows)]
    if not silent:
        return None
    are = "component gives" if len(silent) == 1 else "components give"
    return (
        f"the reward {are} no value for any completion in {len(doctor.rows)} steps: {', '.join(silent)}; the function "
        "returns None, or fails and is skipped (reward.on_error=skip): correct it, or remove the component from "
        "reward.components"
    )


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
    sampling_differs,
    weights_did_not_move,
    memory_grows,
    component_without_values,
)


def _at_the_top(doctor: Doctor) -> bool:
    """Whether the correctness component of the reward is so near its maximum that little is left to learn."""
    correct = doctor.last("rewards/correctness/mean", 10)
    top = doctor.maxima.get("correctness")
    return top is not None and bool(correct) and fmean(correct) >= 0.9 * top


def _values(rows: Sequence[Row], name: str) -> list[float]:
    values = (row.get(name) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]


def _noise(values: Sequence[float]) -> float:
    """The standard deviation of single values, from the differences of neighbours, which a trend hardly changes."""
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    return math.sqrt(fmean(squares) / 2)
