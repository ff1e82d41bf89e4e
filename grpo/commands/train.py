"""Train with GRPO: start or resume a run, or a sweep.

grpo train                                       Qwen2.5-1.5B-Instruct on GSM8K
grpo train experiment=quickstart                 embedded model and data, half a minute on a CPU
grpo train -m grpo.beta=0.01,0.04                a sweep
grpo train resume=true [run_dir=outputs/...]     resume a run

In a checkout `python launch.py` is the same.
"""

import os
import signal
from functools import partial
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from grpo.config.hydra_app import only_shows, read_flags, show
from grpo.config.instantiate import directory_restored
from grpo.launch.decide import Launch, decide
from grpo.launch.process import report_errors, run_command
from grpo.launch.session import open_run
from grpo.runs.locations import hydra_record, job_folder_name
from grpo.runs.stop_signals import Exit, stop_signals
from grpo.sweeps.closing import conclude


def main(arguments: list[str]) -> int:
    """Launch a run or a sweep. Returns the exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes errors on to run_command, which prints them
    return run_command(partial(_launch, arguments))


def _launch(arguments: list[str]) -> int:
    for number in stop_signals():  # until the run handles them itself: exit after cleaning up
        if number != signal.SIGINT:  # Python itself raises KeyboardInterrupt
            signal.signal(number, _leave)
    flags = read_flags(arguments)
    if only_shows(flags):
        return show(arguments, train_job)
    with decide(flags) as launch:
        if isinstance(launch, int):  # a plan was printed, or the run has finished already
            return launch
        sweep = launch.sweep
        if sweep is None:
            launch.app.start(partial(train_run, launch), launch.overrides, multirun=False)
            return 0
        try:
            code = report_errors(lambda: launch.app.start(train_job, launch.overrides, multirun=True))
        finally:
            ended = report_errors(lambda: int(conclude(sweep)))
        return ended or code


def _leave(number: int, _: FrameType | None) -> None:
    raise Exit(128 + number)


def train_run(launch: Launch, cfg: DictConfig) -> float | None:
    """Run the single run of a launch, with the config and the folder that `decide` chose."""
    if OmegaConf.to_container(cfg, resolve=False) != OmegaConf.to_container(launch.config, resolve=False):
        raise RuntimeError("Hydra composed another config than the one that was decided on")
    return train_job(launch.config, launch)


def train_job(cfg: DictConfig, launch: Launch | None = None) -> float | None:
    """Run a single run or a job of a sweep. Returns the objective that sweepers maximize.

    The objective is the validation accuracy after training or, without one, the mean reward of the last step.
    """
    if HydraConfig.get().job.chdir:  # paths stay relative to the directory in which the command was given
        os.chdir(get_original_cwd())
    with directory_restored(), open_run(cfg, launch.run if launch else None) as run:
        if not run.done:
            from grpo.training.train import train  # imported here: it imports torch, which --help and --cfg don't need

            train(run)
        return run.folder.objective()


# Resolvers that only compute folder names. They are registered in this module, since a process that runs a job of a
# sweep imports it before it reads the job's config.
OmegaConf.register_new_resolver("job_folder", job_folder_name, replace=True)
OmegaConf.register_new_resolver("hydra_record", hydra_record, replace=True)
