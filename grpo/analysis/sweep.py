"""Analysis of a sweep: its jobs as a table, its arms, and the effect of each swept key."""

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from grpo.analysis.accuracy import accuracy_interval, share_interval, wilson_interval
from grpo.analysis.effects import Estimate, crossed_mean, paired_difference
from grpo.analysis.load import (
    component_columns,
    correct_by_problem,
    finite_values,
    load_evaluations,
    load_metrics,
    read_config,
)
from grpo.analysis.target import time_to_target
from grpo.config.command_line import launch_command
from grpo.config.overrides import Overrides
from grpo.runs.folder import RunFolder
from grpo.runs.halving_state import SEED, HalvingState
from grpo.runs.sweep_folder import SweepFolder, short


@dataclass(frozen=True)
class Effect:
    """The effect of one value of a swept key against another, with all other keys and the seed equal."""

    key: str
    base: str
    value: str
    pairs: int  # of jobs
    difference: Estimate

    @property
    def verdict(self) -> str:
        """What the difference shows, as text."""
        return verdict(self.difference)


def verdict(difference: Estimate) -> str:
    """What a difference shows, as text; with one seed the text says that it holds for that seed."""
    if not difference.excludes_zero:
        return "no difference shown"
    return ("higher" if difference.mean > 0 else "lower") + (", with this seed" if difference.seeds == 1 else "")


@dataclass(frozen=True)
class Arm:
    """A group of jobs that differ only in their seed."""

    values: tuple[str, ...]  # values of the swept keys except the seed
    jobs: tuple[int, ...]  # numbers of the finished jobs
    outcome: Estimate


class SweepAnalysis:
    """The results of a sweep folder. Jobs that differ only in their seed form an arm; only finished jobs are compared.

    Arms are ranked by their outcome: accuracy after training on the validation problems, problem by problem; without
    such problems on the test problems; or, if a finished job was not evaluated, the mean reward of the last tenth of
    the steps. Raises FileNotFoundError if `path` is not a sweep
    folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = SweepFolder(path)
        record = self.folder.record()
        if not record:
            raise FileNotFoundError(f"{path} is not the folder of a sweep: it has no sweep.json")
        self.overrides: list[str] = record["overrides"]
        self.swept: list[str] = record["keys"]
        self.flags: list[str] = record.get("flags", [])
        self.flags += Overrides(record.get("hydra", [])).select({"hydra.searchpath"}).lines
        self.is_grid = record.get("planned") is not None  # else the sweeper chose its points during the sweep
        self.keys = [key for key in self.swept if key != SEED]  # the keys that define the arms
        self.jobs, self._seeds, correct, self._correct_on_test = _read_jobs(self.folder, self.swept)
        finished = self.jobs[self.jobs["state"] == "finished"]
        splits = set(finished["split"].dropna())
        self.split = splits.pop() if len(splits) == 1 else None  # of the problems by which arms are ranked
        graded = all(len(correct.get(job, ())) for job in finished.index)
        self.by_accuracy = bool(len(finished)) and graded and self.split is not None
        # Job number -> values that are compared: the job's mean reward, or 1 (right) or 0 (wrong) for each problem.
        self._rewards = {job: pd.Series({"reward": each}) for job, each in finished["mean_reward"].dropna().items()}
        self._outcomes = {job: correct[job] for job in finished.index} if self.by_accuracy else self._rewards
        self.arms = self._rank_arms()
        self.unfinished = self.jobs[~self.jobs["state"].isin(["finished", "stopped early"])]
        halving = HalvingState.read(self.folder.path)
        self.arms_tried = len(halving.arms if halving else self.arms)  # number of arms that the best was chosen from

    def metrics(self, job: int) -> pd.DataFrame:
        """The metrics of a job, one row per step."""
        return load_metrics(self.folder.path / self.jobs.loc[job, "folder"])

    def evaluations(self, job: int) -> pd.DataFrame:
        """The evaluations of a job during its training by which it is ranked, one row each."""
        found = load_evaluations(self.folder.path / self.jobs.loc[job, "folder"], of_training=True)
        return found[found["split"] == self.split]

    @functools.cached_property
    def test_accuracy(self) -> Estimate | None:
        """The accuracy of the best arm on the test problems, if it was chosen by others and evaluated on them."""
        if not self.arms or self.split != "validation":
            return None
        rows = [self._correct_on_test[job] for job in self.arms[0].jobs]
        return _accuracy(rows) if all(len(row) for row in rows) else None

    def label(self, arm: Arm) -> str:
        """The overrides of an arm as text, with long values shortened."""
        return " ".join(f"{key}={short(value)}" for key, value in zip(self.keys, arm.values, strict=True)) or "the run"

    def effects(self, in_reward: bool = False) -> list[Effect]:
        """The effect of each value of each swept key except the seed, against the first value of that key.

        It is computed over all pairs of jobs that are equal in every other swept key. in_reward: compare the mean
        reward of the last tenth of the steps instead of the outcome by which arms are ranked.
        """
        outcomes = self._rewards if in_reward else self._outcomes
        finished = self.jobs.loc[list(outcomes)]
        values = {key: list(dict.fromkeys(finished[key].dropna())) or [None] for key in self.keys}
        paired = [(key, base, value) for key, (base, *others) in values.items() for value in others]
        effects = []
        for key, base, value in paired:
            pairs = self._pairs(finished, key, base, value, [other for other in self.swept if other != key])
            difference = self._difference(pairs, outcomes, len(paired))
            if difference is not None:
                effects.append(Effect(key, base, value, len(pairs), difference))
        return effects

    @functools.cached_property
    def gap_to_best(self) -> dict[Arm, Estimate]:
        """The difference of each other arm from the best (negative: below it), over the seeds that both have.

        Arms that have no seed or no problem in common with the best are omitted.
        """
        compared: dict[Arm, Estimate] = {}
        if not self.arms:
            return compared
        best, *others = self.arms
        for arm in others:
            seeds = [{self.jobs.loc[job].get(SEED): job for job in each.jobs} for each in (best, arm)]
            pairs = [(seeds[0][seed], seeds[1][seed]) for seed in seeds[0] if seed in seeds[1]]
            difference = self._difference(pairs, self._outcomes, len(others))
            if difference is not None:
                compared[arm] = difference
        return compared

    def commands(self, fresh_seeds: int = 3) -> dict[str, str]:
        """Shell commands: `reproduce` runs the best arm again, `confirm` runs it with seeds that no job had."""
        arm = dict(zip(self.keys, self.arms[0].values, strict=True))
        # Each value stays at the position of the swept values, since a later override may change what an earlier one
        # sets.
        overrides = Overrides(self.overrides)
        searched = [f"{key}={value}" for key, value in arm.items() if key not in overrides.keys]
        own = overrides.without({SEED}).with_texts(arm)
        again = ",".join(map(str, sorted({self._seeds[job] for job in self.arms[0].jobs})))
        fresh = ",".join(str(max(self._seeds.values()) + number) for number in range(1, fresh_seeds + 1))
        return {
            "reproduce": launch_command(*self.flags, *["-m"] * ("," in again), *searched, *own, f"seed={again}"),
            "confirm": launch_command(*self.flags, "-m", *searched, *own, f"seed={fresh}"),
        }

    def _rank_arms(self) -> list[Arm]:
        groups: dict[tuple[str, ...], list[int]] = {}
        for job in self._outcomes:
            groups.setdefault(tuple(self.jobs.loc[job, self.keys]), []).append(job)
        arms = [Arm(values, tuple(jobs), self._outcome(jobs)) for values, jobs in groups.items()]
        return sorted(arms, key=lambda arm: arm.outcome.mean, reverse=True)

    def _outcome(self, jobs: list[int]) -> Estimate:
        rows = [self._outcomes[job] for job in jobs]
        return _accuracy(rows) if self.by_accuracy else crossed_mean(_table(rows))

    def _pairs(self, finished: pd.DataFrame, key: str, base: str, value: str, rest: list[str]) -> list[tuple[int, int]]:
        def by_rest(of: str) -> dict[Hashable, int]:
            chosen = finished[finished[key] == of]
            return {tuple(row[rest]): job for job, row in chosen.iterrows()}

        before = by_rest(base)
        after = by_rest(value)
        return [(before[setting], after[setting]) for setting in before if setting in after]

    def _difference(
        self, pairs: list[tuple[int, int]], outcomes: dict[int, pd.Series], comparisons: int
    ) -> Estimate | None:
        """The mean outcome of the second job of each pair minus that of the first; None without a common problem.

        Pairs with the same seed are averaged first, since only seeds and problems are random, not the other keys.
        """
        rows = {pair: (outcomes[pair[1]] - outcomes[pair[0]]).dropna() for pair in pairs}
        rows = {pair: row for pair, row in rows.items() if len(row)}
        table = pd.DataFrame(list(rows.values())).dropna(axis=1)
        if table.empty:
            return None
        seeds = [self.jobs.loc[before].get(SEED, "") for before, _ in rows]
        estimate = paired_difference(table.groupby(seeds).mean(), comparisons)
        if outcomes is self._rewards or estimate.interval is None:
            return estimate
        low, high = estimate.interval
        return replace(estimate, interval=(max(-1.0, low), min(1.0, high)))


def _table(rows: list[pd.Series]) -> pd.DataFrame:
    """The values of jobs (rows) of the problems that all of them have, or their means if there are none."""
    table = pd.DataFrame(rows).dropna(axis=1)
    return pd.DataFrame([[row.mean()] for row in rows]) if table.empty else table


def _accuracy(rows: list[pd.Series]) -> Estimate:
    """The accuracy of jobs: rows of 1 (right) and 0 (wrong) by problem.

    If all jobs solve nearly the same problems, usually all of them, the interval from their variation is too narrow. So
    it is extended to Wilson's; for one job it is that of `share_interval`.
    """
    estimate = crossed_mean(_table(rows))
    if len(rows) == 1 and (interval := share_interval(rows[0].to_list())) is not None:
        return replace(estimate, interval=(interval[0], interval[1]))
    wilson = wilson_interval(estimate.mean, max(len(row) for row in rows))
    if wilson is None or estimate.interval is None:
        return estimate
    (low, high) = wilson
    (seen_low, seen_high) = estimate.interval
    return replace(estimate, interval=(max(0.0, min(low, seen_low)), min(1.0, max(high, seen_high))))


def _read_jobs(
    folder: SweepFolder, keys: list[str]
) -> tuple[pd.DataFrame, dict[int, int], dict[int, pd.Series], dict[int, pd.Series]]:
    """Read the jobs of a sweep. Returns (jobs, seeds, correct, correct_on_test).

    jobs: one row per job, indexed by its number: values of the swept keys, state, step, and results. accuracy and
    best_accuracy: on the problems of `split`, 0 to 1, after training and at its best, with the 95 % Wilson interval of
    the former; test_accuracy: on the test problems after training; mean_reward, rewards/<component>,
    completions/mean_length, kl: means over the last tenth of the steps; num_tokens; seconds in steps; steps_to_target
    and minutes_to_target, if the job has a target.accuracy and reached it. seeds: job number
    -> seed, for jobs that have started. correct: job number -> 1 (right) or 0 (wrong) for each problem of `split` after
    training; correct_on_test: the same for the test problems.
    """
    rows = []
    seeds = {}
    correct = {}
    on_test = {}
    jobs = folder.jobs()
    unique = len({job["job"] for job in jobs}) == len(jobs)  # see SweepFolder.jobs
    for place, job in enumerate(jobs):
        number = job["job"] if unique else place
        row = {"job": number, "folder": job["folder"], "state": job["state"]}
        row |= {key: None for key in keys} | Overrides(job["overrides"]).texts
        row |= {"step": job["step"], "total_steps": job["total_steps"], "error": job["error"]}
        if job["folder"] is not None and (folder.path / job["folder"] / "config.yaml").exists():
            run = folder.path / job["folder"]
            try:
                config = read_config(run)
                seeds[number] = int(config.get("seed") or 0)
                row |= _results(run) | _time_to_target(run, config)
                correct[number] = correct_by_problem(RunFolder(run).evaluation_at(job["step"]))
                on_test[number] = correct_by_problem(RunFolder(run).evaluation("after"))
            except (ValueError, KeyError, TypeError, AttributeError) as broken:  # the other jobs can still be compared
                row |= {"state": "unreadable", "error": f"{type(broken).__name__}: {broken}"}
        rows.append(row)
    columns = ["split", "accuracy", "accuracy_low", "accuracy_high", "best_accuracy", "test_accuracy"]
    columns += ["mean_reward", "num_tokens", "seconds"]
    first = ["job", "folder", "state", *keys, "step", "total_steps", "error"]
    frame = pd.DataFrame(rows, columns=None if rows else first).set_index("job")
    return (
        frame.reindex(columns=[*frame, *(column for column in columns if column not in frame)]),
        seeds,
        correct,
        on_test,
    )


def _time_to_target(run_dir: Path, config: dict[str, Any]) -> dict[str, float | None]:
    if (config.get("target") or {}).get("accuracy") is None:
        return {}
    reached = time_to_target(RunFolder(run_dir), config)
    if reached is None:
        return {"steps_to_target": None, "minutes_to_target": None}
    return {"steps_to_target": reached["step"], "minutes_to_target": reached["seconds"] / 60}


def _results(run_dir: Path) -> dict[str, float | None]:
    metrics = load_metrics(run_dir)
    run = RunFolder(run_dir)
    last = run.evaluation_at(int(metrics["step"].iloc[-1])) if len(metrics) else None
    tenth = metrics.tail(-(-len(metrics) // 10))
    scores = [each["accuracy"] for each in run.choosing_evaluations() if each["step"] and each["accuracy"] is not None]
    low, high = (last and accuracy_interval(last)) or (None, None)
    names = {f"rewards/{name}": column for name, column in component_columns(metrics).items()}
    names = {"mean_reward": "reward", **names, "completions/mean_length": "completions/mean_length", "kl": "kl"}
    return {
        "split": last["split"] if last else None,
        "accuracy": last["accuracy"] if last else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "best_accuracy": max(scores, default=None),
        "test_accuracy": (run.evaluation("after") or {}).get("accuracy"),
        **{name: finite_values(tenth, column).mean() for name, column in names.items()},
        "num_tokens": finite_values(metrics, "num_tokens").max(),
        "seconds": finite_values(metrics, "step_time").sum(),
    }
