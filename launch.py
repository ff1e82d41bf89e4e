"""Train with GRPO: compose an experiment, open its run folder, train, return the objective.

python launch.py                                       Qwen2.5-1.5B-Instruct on GSM8K
python launch.py experiment=quickstart                 embedded model and data, minutes on a CPU
python launch.py -m grpo.beta=0.01,0.04                a sweep
python launch.py resume=true [run_dir=outputs/...]     go on with a run
"""

import os
import sys

import hydra
from omegaconf import DictConfig

from grpo.compose import run_command
from grpo.run.session import open_run
from grpo.run.sweep import run_sweep_or_run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def launch(cfg: DictConfig) -> float | None:
    """One run. Returns what sweeps maximise: held-out accuracy after training, or else the last mean reward."""
    with open_run(cfg) as run:
        if not run.done:
            from grpo.trainer import train  # here, since it imports torch: --help and --cfg answer without

            train(run)
        return run.folder.objective()


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to run_command, which words them
    sys.exit(run_sweep_or_run(lambda: run_command(launch)))
