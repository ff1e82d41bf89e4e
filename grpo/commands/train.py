"""Train with GRPO: compose an experiment, open its run folder, train, return the objective.

grpo train                                       Qwen2.5-1.5B-Instruct on GSM8K
grpo train experiment=quickstart                 embedded model and data, minutes on a CPU
grpo train -m grpo.beta=0.01,0.04                a sweep
grpo train resume=true [run_dir=outputs/...]     resume a run

In a checkout `python launch.py` is the same.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_original_cwd
from omegaconf import DictConfig

from grpo.compose import run_command
from grpo.config import CONF_DIR
from grpo.run.session import open_run
from grpo.run.sweep import run_sweep_or_run


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def launch(cfg: DictConfig) -> float | None:
    """One run. Returns what sweeps maximise: held-out accuracy after training, or else the last mean reward."""
    if HydraConfig.get().job.chdir:  # paths stay relative to the directory in which the command was given
        os.chdir(get_original_cwd())
    with open_run(cfg) as run:
        if not run.done:
            from grpo.trainer import train  # here, since it imports torch: --help and --cfg answer without

            train(run)
        return run.folder.objective()


def main(arguments: list[str]) -> int:
    """Launch a run or a sweep with a command line of Hydra's. Returns the exit code."""
    sys.argv[1:] = arguments  # which Hydra reads
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to run_command, which words them
    return run_sweep_or_run(lambda: run_command(launch))
