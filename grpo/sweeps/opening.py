"""Preparation of a sweep: find its folder and its jobs, and check that each job can run."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.hydra_app import compose_job, config_flags, has_plugin, split_into_jobs, without_hydra
from grpo.config.overrides import Overrides, quoted
from grpo.config.schema import LAUNCH_KEYS, Config
from grpo.runs.choice import check_empty
from grpo.runs.files import check_contents, short_path
from grpo.runs.locations import outputs
from grpo.runs.sweep_folder import SweepFolder, newest_sweep

Check = Callable[[DictConfig, Overrides], Config]


@dataclass(frozen=True)
class SweepOpening:
    """A sweep that passed every check; nothing of it has been written to disk yet."""

    folder: SweepFolder  # the folder to resume, or the wanted folder of a new sweep
    is_new: bool  # whether it is a new folder, which gets another name if the wanted one is taken
    begun: bool  # whether a sweep was started in the folder before
    overrides: Overrides  # of the experiment, as recorded in sweep.json
    task: Overrides  # the same for Hydra, with a plain list of values for each swept key
    points: list[list[str]] | None  # the overrides of each job; None if the sweeper chooses its points itself
    configs: list[Config]  # of each job; if the points are unknown, one of what they have in common
    hydra: Overrides  # of Hydra's own settings
    sweeper: str  # the choice of hydra/sweeper
    flags: list[str]  # command line flags that say where the config is
    excluded: list[str]  # keys that are not part of the names of job folders
    has_params: bool  # whether the sweeper has `params`, which the overrides then include

    @property
    def unknown(self) -> Overrides:
        """The swept overrides whose values the sweeper chooses only during the sweep."""
        return self.task.select(self.task.swept if self.points is None else ())

    def begin(self, folder: SweepFolder) -> None:
        """Write sweep.json, or update it if the sweep is resumed."""
        folder.begin(self.overrides, self.task.swept, self.points, self.hydra.lines, self.sweeper, self.flags)

    def overrides_for(self, folder: SweepFolder) -> list[str]:
        """The overrides that Hydra is started with. Each job's config is composed with them, in any process."""
        own = [f"hydra.sweep.dir={quoted(str(folder.path))}"]
        own.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join(self.excluded)}]")
        if self.has_params:
            own.append("hydra.sweeper.params=null")
        return [*self.hydra.without({"hydra.sweep.dir"}), *own, *self.task]


def prepare_sweep(composed: DictConfig, overrides: Overrides, named: str | None, check: Check) -> SweepOpening:
    """Check the sweep that a command line asks for, a new one or one to resume.

    named: the sweep folder given by the user, if any. Raises ConfigError or an exception of Hydra.
    """
    check_sweep(composed)
    if overrides.names("hydra.run.dir"):
        raise ConfigError("hydra.run.dir names the folder of one run; that of a sweep is sweep_dir=...")
    sweeper = composed.hydra.sweeper
    choice = composed.hydra.runtime.choices["hydra/sweeper"]
    asked = with_params(overrides.of_experiment, sweeper)
    known = _known_folder(composed, named, asked, choice)
    kept = asked
    planned: list[list[str]] = []
    if known is not None:
        check_contents(known.path)
        if known.record():
            known.check_same(asked, choice, composed.resume)
            kept = known.continued(asked)
            planned = known.planned(points_of(kept, sweeper))
        elif not known.begun():
            check_empty(known.path)
    # Expanded only once, since `seed=shuffle(1,2,3)` would give the jobs another order each time.
    given = points_of(kept, sweeper)
    task = kept.expand(planned or given or ())
    check_swept(task)
    points = points_of(task, sweeper)
    configs = check_points(composed, task, points, check)
    if given is not None and not (known and known.record()):
        check_different([" ".join(Overrides(point).select(task.swept)) for point in given], configs)
    excluded = {*composed.hydra.job.config.override_dirname.exclude_keys, *LAUNCH_KEYS}
    excluded |= set(task.keys) - set(task.swept)
    return SweepOpening(
        folder=known or SweepFolder(outputs() / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"),
        is_new=known is None,
        begun=known is not None and known.begun(),
        overrides=kept,
        task=task,
        points=points,
        configs=configs,
        hydra=overrides.of_hydra.without({"hydra.mode"}),
        sweeper=choice,
        flags=config_flags(composed.hydra),
        excluded=sorted(excluded),
        has_params=bool(sweeper.get("params")),
    )


def _known_folder(composed: DictConfig, named: str | None, asked: Overrides, choice: str) -> SweepFolder | None:
    """The folder given by the user or, when resuming, of the newest sweep with these overrides; None: a new sweep."""
    path = named or (newest_sweep(asked, choice) if composed.resume else None)
    folder = SweepFolder(short_path(path)) if path is not None else None
    if composed.resume is True and (folder is None or not folder.begun()):
        raise ConfigError(
            "resume=true: no sweep with these overrides was found; give those of its first launch, or name it with "
            "sweep_dir=outputs/sweeps/..."
        )
    return folder


def check_sweep(composed: DictConfig) -> None:
    """Raise ConfigError for settings that a sweep does not support."""
    hydra = composed.hydra
    for part in ("launcher", "sweeper"):
        if not has_plugin(hydra[part]._target_):
            choice = hydra.runtime.choices[f"hydra/{part}"]
            raise ConfigError(f"hydra/{part}={choice}: no Hydra plugin {hydra[part]._target_} is installed")
    written: Any = OmegaConf.to_container(hydra.sweep, resolve=False)  # a dict
    subdir = written["subdir"]
    if not subdir.startswith(("${job_folder:", "${hydra.job.num}")):
        raise ConfigError(f"hydra.sweep.subdir={subdir}: must begin with ${{hydra.job.num}}, by which jobs are found")
    at_once = hydra.launcher.get("jobs_at_once")
    if at_once is not None and not (isinstance(at_once, int) and at_once > 0):
        raise ConfigError(f"hydra.launcher.jobs_at_once={at_once} must be a number above 0, or null")
    if "minimize" in str(hydra.sweeper.get("direction")):  # the default of Optuna's own config
        raise ConfigError(
            "hydra.sweeper.direction=minimize: the outcome of a run is to be maximized; use hydra/sweeper=tpe, or "
            "hydra.sweeper.direction=maximize"
        )
    if hydra.sweeper.get("max_batch_size") is not None:
        raise ConfigError("hydra.sweeper.max_batch_size: with it a job that fails ends the sweep; leave it out")


def check_swept(task: Overrides) -> None:
    """Raise ConfigError if a key is swept that concerns the whole launch. A fork's run_dir and fork_step may be."""
    for key in task.swept:
        if key in LAUNCH_KEYS - {"run_dir", "fork_step"}:
            raise ConfigError(f"{task.last_by_key[key]}: {key} concerns the whole sweep, so it has one value")


def check_points(
    composed: DictConfig, task: Overrides, points: Sequence[Sequence[str]] | None, check: Check
) -> list[Config]:
    """Return the config of each job. Raises ConfigError or an exception of Hydra if a job cannot start.

    points: the overrides of each job; None: they are unknown, so only the config that all jobs share is checked.
    """
    if points is None:
        configs = [check(without_hydra(composed), task)]
    elif not points:
        raise ConfigError(f"no job: {' '.join(task.select(task.swept))} matches no choice of a group")
    else:
        configs = [_check_job(composed, Overrides(point), task.swept, check) for point in points]
    check_equal_steps(configs, composed.hydra.sweeper)
    return configs


def _check_job(composed: DictConfig, point: Overrides, swept: Sequence[str], check: Check) -> Config:
    job = compose_job(composed.hydra, point.lines)
    for name in ("launcher", "sweeper", "sweep.dir", "mode"):
        if _unresolved(job.hydra, name) != _unresolved(composed.hydra, name):
            raise ConfigError(
                f"{' '.join(point.select(swept))} sets hydra.{name}, which is one for all jobs of a sweep: set it on "
                "the command line"
            )
    if job.run_dir is not None and not job.fork:
        raise ConfigError("run_dir names the folder of one run; that of a sweep is sweep_dir=...")
    return check(without_hydra(job), point)


def _unresolved(hydra: DictConfig, name: str) -> Any:
    values: Any = OmegaConf.to_container(hydra, resolve=False)  # a dict
    for part in name.split("."):
        values = values[part]
    return values


def check_different(names: Sequence[str], configs: Sequence[Config]) -> None:
    """Raise ConfigError if two jobs would train the same run. names: the swept overrides of each job."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{repeated[0]} is given {Counter(names)[repeated[0]]} times: give each value once")
    seen: dict[str, str] = {}
    for name, config in zip(names, configs, strict=True):
        first = seen.setdefault(repr(config), name)
        if first != name:
            raise ConfigError(f"{first} and {name} are the same run: give only one of them")


def check_equal_steps(configs: Sequence[Config], sweeper: DictConfig) -> None:
    """Raise ConfigError if halving would compare arms with different numbers of steps."""
    steps = {each.grpo.num_iterations * each.grpo.num_steps for each in configs}
    if is_halving(sweeper) and len(steps) > 1:
        raise ConfigError("hydra/sweeper=halving compares arms after equal steps: leave grpo.num_steps out")
    if is_halving(sweeper) and any(each.target.accuracy is not None and each.target.stop for each in configs):
        raise ConfigError("hydra/sweeper=halving compares arms after equal steps: set target.stop=false")


def with_params(overrides: Overrides, sweeper: DictConfig) -> Overrides:
    """The overrides of a sweep, preceded by the sweeper's `params` for keys that they do not set."""
    params: Any = OmegaConf.to_container(sweeper.get("params") or OmegaConf.create(), resolve=False)  # a dict
    added = Overrides([f"{key}={value}" for key, value in params.items()])
    return Overrides([*added.without(overrides.keys), *overrides])


def points_of(overrides: Overrides, sweeper: DictConfig) -> list[list[str]] | None:
    """The overrides of each job of a sweep over all combinations; None if the sweeper chooses its points itself."""
    if not sweeper._target_.endswith(("BasicSweeper", "HalvingSweeper")):
        return None
    return split_into_jobs(overrides.lines)


def is_halving(sweeper: DictConfig) -> bool:
    """Whether the sweeper is successive halving."""
    return sweeper._target_.endswith("HalvingSweeper")
