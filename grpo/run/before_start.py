"""Which folder a launch uses, decided and checked before Hydra creates or overwrites anything in it."""

import sys
from collections.abc import Sequence
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config import ConfigError, typed
from grpo.run.folder import OUTPUTS, RunFolder, job_folder_name, newest_unfinished


def run_folder(run_dir: str | None, resume: bool | str, name: str, now: str) -> str:
    """The folder of this launch: the one given, the newest unfinished one where it resumes, else a new one."""
    if run_dir:
        return run_dir
    # `auto` is for the same command again (a queue that restarts it), so it stays within the experiment's name.
    unfinished = newest_unfinished(OUTPUTS / name if resume == "auto" else OUTPUTS) if resume else None
    if unfinished is None and resume is True:
        raise ConfigError(
            f"resume=true: no unfinished run below {OUTPUTS}/; name one with run_dir=..., or start without resume"
        )
    return str(unfinished.path if unfinished else OUTPUTS / name / now)


def sweep_folder(sweep_dir: str | None, now: str) -> str:
    """The folder of a sweep, which holds one folder for each job."""
    return sweep_dir or str(OUTPUTS / "sweeps" / now)


def hydra_record(resume: bool | str, now: str) -> str:
    """Where Hydra records this launch within the run folder, without touching the record of the first one."""
    return f".hydra/resumes/{now}" if resume else ".hydra"


def register_resolvers() -> None:
    """Make the functions above available to conf/config.yaml."""
    for function in (run_folder, sweep_folder, hydra_record):
        OmegaConf.register_new_resolver(function.__name__, function, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder_name, replace=True)


def asks_for_more_steps(overrides: Sequence[str]) -> bool:
    """Whether a command line sets the number of steps, with which a finished run can go on."""
    return any(override.startswith(("grpo.num_steps=", "grpo.num_iterations=")) for override in overrides)


def check_folder(run: RunFolder, resume: bool | str, overrides: Sequence[str]) -> None:
    """Raise ConfigError where this launch would spoil a folder, or has nothing to go on from."""
    path = run.path
    if not resume:
        if run.started():
            raise ConfigError(
                f"{path} holds a run already; go on with it: resume=true run_dir={path}, or choose another run_dir"
            )
        return
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
        raise ConfigError(f"resume=true: {path} has finished already; to train it further, add a larger grpo.num_steps")


class CheckBeforeStart(Callback):
    """Hydra calls this before it makes the run folder. Only SystemExit stops it there: other errors just warn."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        try:
            settings = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            typed(settings)
            run = RunFolder(run_folder(config.run_dir, config.resume, config.name, config.name))
            if config.run_dir or config.resume is True:
                check_folder(run, config.resume, config.hydra.overrides.task)
            if config.resume == "auto" and run.finished():
                print(f"{run.path} has finished already: nothing to do")
                sys.exit(0)
        except (ConfigError, OmegaConfBaseException) as error:
            from grpo.compose import explain  # here, since that module needs this one's resolvers

            print(f"error: {explain(error)}", file=sys.stderr)
            sys.exit(2)


register_resolvers()
