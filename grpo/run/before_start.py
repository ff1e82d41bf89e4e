"""Which folder a launch uses, decided and checked before Hydra creates or overwrites anything in it."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from grpo.config import ConfigError, first_line, typed
from grpo.run import sweep
from grpo.run.folder import OUTPUTS, RunFolder, check_links, job_folder_name, newest_unfinished
from grpo.run.gpus import remember_gpus
from grpo.run.halving import Record, arms_of, choose_ladder, seconds
from grpo.run.lock import locked
from grpo.targets import check_importable


def run_folder(
    run_dir: str | None, resume: bool | str, fork: bool, name: str, overrides: Sequence[str], now: str
) -> str:
    """The folder of this launch: the one given, the newest unfinished one where it resumes, else a new one."""
    if fork:
        parent = RunFolder(run_dir or "")
        named = any(override.startswith("name=") for override in overrides) or not parent.started()
        return str(OUTPUTS / (name if named else _name_of(parent)) / now)
    if run_dir:
        return run_dir
    # `auto` is for the same command again (a queue that restarts it), so it stays within the experiment's name.
    unfinished = newest_unfinished(OUTPUTS / name if resume == "auto" else OUTPUTS) if resume else None
    if unfinished is None and resume is True:
        raise ConfigError(
            f"resume=true: no unfinished run below {OUTPUTS}/; name one with run_dir=..., or start without resume"
        )
    return str(unfinished.path if unfinished else OUTPUTS / name / now)


def _name_of(parent: RunFolder) -> Path:
    name = Path(str(parent.frozen_config().name))
    if name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"{parent.path} has the name {name}, which leads out of {OUTPUTS}/; add name=...")
    return name


def sweep_folder(sweep_dir: str | None, now: str) -> str:
    """The folder of a sweep, which holds one folder for each job."""
    return sweep_dir or str(OUTPUTS / "sweeps" / now)


def hydra_record(folder: str, now: str) -> str:
    """Where Hydra records this launch within the run folder, without touching the record of the first one."""
    return f".hydra/resumes/{now}" if RunFolder(folder).started() else ".hydra"


def register_resolvers() -> None:
    """Make the functions above available to conf/config.yaml."""
    for function in (run_folder, sweep_folder, hydra_record):
        OmegaConf.register_new_resolver(function.__name__, function, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder_name, replace=True)


def asks_for_more_steps(overrides: Sequence[str]) -> bool:
    """Whether a command line sets the number of steps, with which a finished run can go on."""
    return any(override.startswith(("grpo.num_steps=", "grpo.num_iterations=")) for override in overrides)


def check_parent(parent: str | None, resume: bool | str) -> None:
    """Raise ConfigError where there is nothing to fork from."""
    if resume:
        raise ConfigError("fork=true starts a new run: leave resume out; to go on with a fork, name its own run_dir")
    if not parent:
        raise ConfigError("fork=true needs the run to start from: run_dir=outputs/...")
    if not RunFolder(parent).started():
        raise ConfigError(f"fork=true: {parent} is not a run folder (it has no config.yaml)")
    check_links(Path(parent))


def check_folder(run: RunFolder, resume: bool | str, overrides: Sequence[str]) -> None:
    """Raise ConfigError where this launch would spoil a folder, or has nothing to go on from."""
    path = run.path
    if not resume:
        if run.started():
            raise ConfigError(
                f"{path} holds a run already; go on with it: resume=true run_dir={path}, or choose another run_dir"
            )
        return
    check_links(path)
    if resume == "auto":
        return
    if not path.exists():
        raise ConfigError(
            f"resume=true: there is no folder {path}; leave run_dir out to take the newest unfinished run"
        )
    if not any(path.iterdir()):
        raise ConfigError(f"resume=true: {path} is empty; start a run there without resume=true")
    if not run.started():
        raise ConfigError(f"resume=true: {path} is not a run folder (it has no config.yaml)")
    if run.finished() and not asks_for_more_steps(overrides):
        raise ConfigError(has_finished(run))


def has_finished(run: RunFolder) -> str:
    """What to say where a run is to go on that needs no more steps."""
    return f"resume=true: {run.path} has finished already; to train it further, add a larger grpo.num_steps"


class CheckBeforeStart(Callback):
    """Hydra calls this before it makes the run folder. Only SystemExit stops it there: other errors just warn."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            settings = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            check_importable(typed(settings))
            if config.plan:
                _plan(config, lambda: [("the run", settings, config.hydra.overrides.task)])
            if config.fork:
                check_parent(config.run_dir, config.resume)
                return
            overrides = config.hydra.overrides.task
            run = RunFolder(config.hydra.run.dir)
            check_folder(run, config.resume, overrides)
            if config.resume == "auto" and run.finished() and not asks_for_more_steps(overrides):
                print(f"{run.path} has finished already: nothing to do")
                sys.exit(0)
        except (ConfigError, OmegaConfBaseException) as error:
            _refuse(error)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Unresolved, since an interpolation in an override is each job's own to resolve.
        given = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        overrides = sweep.with_params(given, config.hydra.sweeper)
        if config.plan:
            _plan(config, lambda: sweep_points(given, config))
        try:
            open_sweep(config, overrides)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            _refuse(error)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
            sys.exit(1)


def open_sweep(config: DictConfig, overrides: Sequence[str]) -> None:
    """Settle which folder a sweep has and what its jobs' folders are called, and begin its sweep.json."""
    _check_sweep(config)
    sweeper = config.hydra.sweeper
    choice = config.hydra.runtime.choices["hydra/sweeper"]
    found = sweep.newest_sweep(overrides, choice) if config.resume and not config.sweep_dir else None
    folder = sweep.SweepFolder(found or config.hydra.sweep.dir)
    check_links(folder.path)
    known = folder.record()
    if config.resume is True and not known and not any(folder.path.glob("*/config.yaml")):
        raise ConfigError(
            "resume=true: there is no such sweep; give the overrides that it had, or name it with "
            "sweep_dir=outputs/sweeps/..."
        )
    folder.check_same(overrides, choice, config.resume)
    named = folder.going_on(overrides) if known else overrides
    # Read once, since `seed=shuffle(1,2,3)` would give the jobs another order each time.
    task = sweep.spelt_out(named, known.get("planned") or sweep.grid(named, sweeper) or ())
    keys, points = sweep.swept_keys(task), sweep.grid(task, sweeper)
    _check_points(config, points)
    hydra = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    given = [each for each in hydra if not each.startswith("hydra.mode=")]
    left_out = {*config.hydra.job.config.override_dirname.exclude_keys}
    left_out |= {each for each in sweep.named(task) if each not in keys}
    # The config of each job is composed anew with these, in whichever process it is.
    path = str(folder.path).replace("'", "\\'")
    own = [
        f"hydra.sweep.dir='{path}'",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(left_out))}]",
    ]
    with open_dict(config):
        config.hydra.sweep.dir = str(folder.path)
        config.hydra.overrides.hydra.extend(own)
        config.hydra.overrides.task = task
        if sweeper.get("params"):
            sweeper.params = None  # they are among the overrides
    remember_gpus()
    folder.path.mkdir(parents=True, exist_ok=True)
    sweep.lock_of_sweep.enter_context(locked(folder.path))
    folder.begin(named, keys, points, given, choice, _config_flags(config))
    sweep.opened = folder


def _check_sweep(config: DictConfig) -> None:
    """Raise ConfigError for what a sweep cannot do."""
    hydra = config.hydra
    for part in ("launcher", "sweeper"):
        if hydra[part]._target_ not in Plugins.instance().class_name_to_class:
            raise ConfigError(
                f"hydra/{part}={hydra.runtime.choices[f'hydra/{part}']} needs: pip install -e '.[sweeps]'"
            )
    at_once = hydra.launcher.get("jobs_at_once")
    if at_once is not None and not (isinstance(at_once, int) and at_once > 0):
        raise ConfigError(f"hydra.launcher.jobs_at_once={at_once} must be a number above 0, or null")
    if hydra.sweeper.get("max_batch_size") is not None:
        raise ConfigError("hydra.sweeper.max_batch_size: with it a job that fails ends the sweep; leave it out")


def _check_points(config: DictConfig, points: list[list[str]] | None) -> None:
    """Raise ConfigError, or what Hydra raises, for a job that cannot start; None: for all, where none is known yet."""
    if points is None:
        composed = [OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])]
    else:
        composed = [_composed(point, config) for point in points]
    for each in composed:
        check_importable(typed(each))
    halving = config.hydra.sweeper._target_.endswith("HalvingSweeper")
    if halving and len({each.grpo.num_iterations * each.grpo.num_steps for each in composed}) > 1:
        raise ConfigError("hydra/sweeper=halving compares arms after equal steps: leave grpo.num_steps out")


def _composed(point: Sequence[str], config: DictConfig) -> DictConfig:
    """The config of a job of the sweep that `config` is the common one of."""
    from grpo.compose import recompose  # here, since that module needs this one's resolvers

    places = [each for each in config.hydra.overrides.hydra if each.startswith("hydra.searchpath=")]
    return recompose([*places, *point], config.hydra.job.config_name)


def _config_flags(config: DictConfig) -> list[str]:
    """The flags of this command that say where its config is."""
    added = [source.path for source in config.hydra.runtime.config_sources if source.provider == "command-line"]
    flags = [each for path in added for each in ("--config-dir", path)]
    name = config.hydra.job.config_name
    return [*flags, *(["--config-name", name] if name != "config" else [])]


def _plan(config: DictConfig, points: Callable[[], list[tuple[str, DictConfig, Sequence[str]]]]) -> NoReturn:
    """Print the plan and exit, whatever happens: of any other error Hydra would only warn, and start."""
    try:
        if config.resume or config.fork:
            raise ConfigError("plan=true is for a new run: leave resume and fork out")
        from grpo.engine.hardware import hardware_found  # imports torch
        from grpo.plan import print_plans

        print_plans([(name, hardware_found(cfg, overrides)) for name, cfg, overrides in points()])
        if config.hydra.sweeper._target_.endswith("HalvingSweeper"):
            print(halving_in_words(config))
    except (ConfigError, OmegaConfBaseException, HydraException) as error:
        _refuse(error)
    except Exception as error:
        print(f"failed: plan=true: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def halving_in_words(config: DictConfig) -> str:
    """How much of a whole sweep one by halving makes."""
    sweeper = config.hydra.sweeper
    arms = arms_of(sweep.grid(sweep.with_params(config.hydra.overrides.task, sweeper), sweeper))
    if config.sweep.budget_hours is not None:
        return f"hydra/sweeper=halving: {config.sweep.budget_hours:g} hours of jobs at most"
    total = config.grpo.num_iterations * config.grpo.num_steps
    rungs = choose_ladder(Record(total, [[0]] * len(arms), config.sweep.eta, None))
    steps = ", ".join(f"{left} arms to step {step}" for step, left in rungs)
    share = seconds(rungs, 1, 1.0, 0.0) / (len(arms) * total)
    return f"hydra/sweeper=halving: {steps}, {share:.0%} of the steps of all"


def sweep_points(overrides: Sequence[str], config: DictConfig) -> list[tuple[str, DictConfig, list[str]]]:
    """Every point of a sweep over a grid: its name, its composed config, and its overrides."""
    sweeper = config.hydra.sweeper
    overrides = sweep.with_params(overrides, sweeper)
    jobs = sweep.grid(overrides, sweeper)
    if jobs is None:
        raise ConfigError("plan=true knows the points of a grid only: add hydra/sweeper=basic")
    keys = sweep.swept_keys(overrides)
    return [(" ".join(sweep.of_keys(job, keys)) or "the run", _composed(job, config), job) for job in jobs]


def _refuse(error: Exception) -> None:
    from grpo.compose import explain  # here, since that module needs this one's resolvers

    print(f"error: {explain(error)}", file=sys.stderr)
    sys.exit(2)


register_resolvers()
