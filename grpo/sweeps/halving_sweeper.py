"""Hydra sweeper for successive halving: `hydra/sweeper=halving`."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from grpo.config.errors import ConfigError
from grpo.config.hydra_app import split_into_jobs
from grpo.config.overrides import Overrides, quoted
from grpo.runs.folder import RunFolder
from grpo.runs.halving_state import LEAST_STEPS, SEED, HalvingState, arms_of, best_arms, choose_ladder
from grpo.runs.sweep_folder import SweepFolder
from grpo.sweeps.launcher import JobFailed


class HalvingSweeper(Sweeper):
    """Successive halving over a grid; jobs that differ only in their seed form an arm.

    eta: the best 1/eta of the arms continue from each rung, to eta times as many steps. budget_hours: limit on the
    total time of all jobs; None: no limit, and the rungs are chosen so that fewer than eta arms reach the last step.
    All decisions are recorded in halving.json in the sweep's folder.
    """

    hydra_context: HydraContext  # these three are set by `setup`
    config: DictConfig
    launcher: Launcher

    def __init__(self, eta: int, budget_hours: float | None, params: DictConfig | None = None) -> None:
        self.eta = eta
        self.budget_hours = budget_hours

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once before `sweep`."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run all rungs. If a job failed, raise the exception of the first one after all other jobs are done."""
        self.points = split_into_jobs(arguments)
        self.validate_batch_is_legal(self.points)
        self.folder = Path(self.config.hydra.sweep.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        self.returns: dict[int, JobReturn] = {}
        self.folders = [self._job_folder(number) for number in range(len(self.points))]
        self.record = self._record()
        self.record.write(self.folder)
        self._climb()
        for done in self.returns.values():
            if done.status == JobStatus.FAILED:
                _ = done.return_value  # raises the job's exception
        for number in range(len(self.folders)):
            if self._state(number) == "failed":
                raise JobFailed(f"job {number} failed in an earlier launch, so its arm is excluded")
        return list(self.returns.values())

    def _record(self) -> HalvingState:
        """The state that earlier launches recorded, with the budget of this one; or a new state."""
        arms = arms_of(self.points)
        known = HalvingState.read(self.folder)
        if known is None:
            grpo = self._composed(0).grpo
            return HalvingState(grpo.num_iterations * grpo.num_steps, arms, self.eta, self.budget_hours)
        if known.arms != arms:
            raise ConfigError(f"{self.folder / 'halving.json'}: arms are not those of this sweep")
        if known.state == "out of budget":  # the budget may have been raised
            known.state = "running"
        if self.budget_hours is not None:
            known.budget_hours = self.budget_hours
        return known

    def _climb(self) -> None:
        record = self.record
        for first, *_ in record.arms if record.budget_hours is not None else ():
            if record.step_s is None:  # not measured yet: an arm before this one may have failed at once
                self._launch([first], min(LEAST_STEPS, record.total_steps))
                self._measure()
        if record.step_s is None and record.budget_hours is not None:
            return
        if not record.ladder:
            self._choose_ladder()
        alive = record.rungs[-1]["kept"] if record.rungs else list(range(len(record.arms)))
        for place in range(len(record.rungs), len(record.ladder)):
            if record.entered is None:
                record.entered = record.affordable(alive, place, self._spent())
            if not record.entered:
                record.entered = None
                record.state = "out of budget"
                break
            record.write(self.folder)
            if not (alive := self._rung(place, record.entered)):
                return  # no job completed the rung; the same command with resume=true tries them again
        else:
            record.state = "finished"
        record.write(self.folder)

    def _rung(self, place: int, entered: list[int]) -> list[int]:
        """Run the arms that entered a rung to its step. Records and returns those that are kept, best first."""
        record = self.record
        (steps, _) = self.record.ladder[place]
        jobs = [job for arm in entered for job in record.arms[arm]]
        for _ in range(2):  # a failed job is tried once more: memory or disk space may have run out for a while
            self._launch(jobs, steps)
            for job in jobs:
                if not self._has_reached(job, steps) and self._state(job) != "failed":
                    raise JobFailed(f"job {job} was stopped before step {steps}, so its rung is not decided")
        self._measure()
        scores, rewards = self._scores(entered, steps)
        last = place + 1 == len(record.ladder)
        kept = best_arms(scores, rewards, len(entered) if last else record.ladder[place + 1][1])
        if kept:
            by_arm = {str(arm): score for arm, score in enumerate(scores) if score is not None}
            record.rungs.append({"steps": steps, "scores": by_arm, "kept": kept, "spent_hours": self._spent() / 3600})
            record.entered = None
            record.write(self.folder)
            print(
                f"rung {place + 1} of {len(record.ladder)}, step {steps}: {len(kept)} of {len(entered)} arms are kept"
            )
            for arm in sorted(entered, key=lambda arm: (kept.index(arm) if arm in kept else len(kept), arm)):
                numbers = f"score {_shown(scores[arm])}, reward {_shown(rewards[arm])}"
                score = "failed" if scores[arm] is None else numbers
                print(f"  {'kept   ' if arm in kept else 'stopped'}  {self._label(arm)}: {score}", flush=True)
        return kept

    def _choose_ladder(self) -> None:
        record = self.record
        try:
            record.ladder = choose_ladder(record)
        except ValueError as least:
            raise ConfigError(
                f"sweep.budget_hours={record.budget_hours}: at {record.step_s:.3g} s per step and "
                f"{record.start_s:.3g} s per job for its start, {len(record.arms)} arms need {least} hours; "
                "raise it, or sweep fewer values"
            ) from None
        record.write(self.folder)
        rungs = ", ".join(f"{arms} arms to step {steps}" for steps, arms in record.ladder)
        about = f", about {record.seconds(record.ladder) / 3600:.2f} hours of jobs" if record.step_s is not None else ""
        print(f"halving: {rungs}{about}", flush=True)

    def _launch(self, jobs: list[int], steps: int) -> None:
        """Run jobs up to a step, except those that have reached it already."""
        jobs = [job for job in jobs if not self._has_reached(job, steps)]
        if not jobs:
            return
        own = [f"until_step={steps}", "resume=auto"]
        # The folder is given by its name, since the launcher numbers the jobs of each rung from 0.
        places = [str(self.folders[job].relative_to(self.folder)) for job in jobs]
        named = zip(jobs, places, strict=True)
        points = [[*self.points[job], *own, f"hydra.sweep.subdir={quoted(place)}"] for job, place in named]
        for job, done in zip(jobs, self.launcher.launch(points, initial_job_idx=0), strict=True):
            self.returns[job] = done

    def _has_reached(self, job: int, steps: int) -> bool:
        run = RunFolder(self.folders[job])
        if steps == self.record.total_steps:
            return run.finished()
        if run.status().get("step") != steps:
            return False
        return run.accuracy_at(steps) is not None or not run.frozen_config().eval.after

    def _state(self, job: int) -> str | None:
        return RunFolder(self.folders[job]).status().get("state")

    def _label(self, arm: int) -> str:
        """The swept overrides of an arm's jobs, without the seed."""
        swept = set(SweepFolder(self.folder).swept) - {SEED}
        return " ".join(Overrides(self.points[self.record.arms[arm][0]]).select(swept)) or "the run"

    def _scores(self, alive: list[int], steps: int) -> tuple[list[float | None], list[float | None]]:
        """The score and the reward of each arm, as the mean over those of its jobs that completed the steps.

        The score is the accuracy on validation problems. If one of these jobs has none, or was begun by an earlier
        version without such problems, all arms are scored by their reward, the mean of the last tenth of the steps.
        Both are None for an arm that is out, or if none of its jobs completed the steps.
        """
        rows = {job: RunFolder(self.folders[job]).metrics(steps) for arm in alive for job in self.record.arms[arm]}
        there = {job: each[-max(1, steps // 10) :] for job, each in rows.items() if len(each) == steps}
        found = {job: RunFolder(self.folders[job]).evaluation_at(steps) for job in there}
        accuracies = {job: each["accuracy"] for job, each in found.items() if each is not None}
        splits = {each["split"] for each in found.values() if each is not None}
        known = {job: [row["reward"] for row in last if row["reward"] is not None] for job, last in there.items()}
        rewards = {job: statistics.fmean(each) for job, each in known.items() if each}
        scores = {job: accuracy for job, accuracy in accuracies.items() if accuracy is not None}
        if len(scores) < len(there) or len(splits) > 1:
            scores = rewards
        return self._mean_of_arms(scores), self._mean_of_arms(rewards)

    def _mean_of_arms(self, of_jobs: Mapping[int, float]) -> list[float | None]:
        of_arms = [[of_jobs[job] for job in jobs if job in of_jobs] for jobs in self.record.arms]
        return [statistics.fmean(each) if each else None for each in of_arms]

    def _measure(self) -> None:
        """Record the mean seconds of a step, and of the rest of a job, over all jobs so far."""
        steps = []
        rest = []
        for folder in self.folders:
            run = RunFolder(folder)
            times = [row["step_time"] for row in run.metrics()]
            if times and run.status().get("seconds"):
                steps += times
                rest.append((run.status()["seconds"] - sum(times)) / max(1, len(run.launches())))
        if steps:
            self.record.step_s = statistics.fmean(steps)
            self.record.start_s = max(0.0, statistics.fmean(rest))
            self.record.write(self.folder)

    def _spent(self) -> float:
        """Total seconds that all jobs have taken so far."""
        return sum(RunFolder(folder).status().get("seconds", 0.0) for folder in self.folders)

    def _composed(self, number: int) -> Any:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, self.points[number])
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        return config

    def _job_folder(self, number: int) -> Path:
        return self.folder / self._composed(number).hydra.sweep.subdir


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"
