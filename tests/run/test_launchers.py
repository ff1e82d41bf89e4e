"""Hydra's launchers and sweepers for real: the same sweep comes out of each, job by job and bit for bit."""

import importlib.util
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf

from grpo.compose import compose_config
from grpo.config import CONF_DIR
from grpo.run.sweep import SweepFolder
from tests.run.test_sweep import QUICK
from tests.runs import ROOT, launch, rows

SWEEP = ["-m", *QUICK, "grpo.num_steps=2", "grpo.beta=0,0.04"]


@pytest.fixture(scope="module")
def basic(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("basic")
    done = launch(*SWEEP, "hydra/launcher=basic", "sweep_dir=sweep", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "sweep"


def installed(plugin):
    return pytest.mark.skipif(
        importlib.util.find_spec(f"hydra_plugins.{plugin}") is None, reason=f"{plugin} is missing"
    )


@pytest.mark.slow  # the default launcher is tested with tests/run/test_sweep.py
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=installed("hydra_joblib_launcher")),
        pytest.param("submitit_local", marks=installed("hydra_submitit_launcher")),
        pytest.param("ray", marks=installed("hydra_ray_launcher")),  # not among dev's packages, since it is large
    ],
)
def test_each_launcher_makes_the_same_runs(basic, tmp_path, launcher):
    # A plain process: one forked from the tests' server does not run what ends joblib's workers.
    command = [sys.executable, ROOT / "launch.py", *SWEEP, f"hydra/launcher={launcher}", "sweep_dir=sweep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower().replace("warning authentication_token", "")
    jobs = SweepFolder(tmp_path / "sweep").jobs()
    assert jobs == SweepFolder(basic).jobs()
    for job in jobs:
        assert rows(tmp_path / "sweep" / job["folder"]) == rows(basic / job["folder"])
    assert (tmp_path / "sweep" / "report.html").exists()


@installed("hydra_optuna_sweeper")
def test_optuna_looks_for_the_highest_outcome_and_goes_on_with_the_same_trials(tmp_path):
    command = [
        "-m",
        *(each for each in QUICK if each != "eval.after=false"),
        "eval.max_problems=40",
        "grpo.num_steps=2",
    ]
    command += ["hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-6,1e-3))", "hydra/launcher=basic"]
    command += ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=1"]
    done = launch(*command, "sweep_dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = SweepFolder(tmp_path / "whole").jobs()
    best = yaml.safe_load((tmp_path / "whole" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(job["accuracy"] for job in jobs)

    fault = ("grpo.trainer.problems_of_step", "5", "kill")  # the third trial
    assert launch(*command, "sweep_dir=killed", cwd=tmp_path, fault=fault).returncode == -9
    again = launch(*command, "sweep_dir=killed", "resume=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert SweepFolder(tmp_path / "killed").jobs() == jobs
    for job in jobs:
        assert rows(tmp_path / "killed" / job["folder"]) == rows(tmp_path / "whole" / job["folder"])


@installed("hydra_submitit_launcher")
def test_what_would_be_handed_to_slurm_is_a_script_with_the_settings(tmp_path):
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    settings = yaml.safe_load((CONF_DIR / "hydra" / "launcher" / "submitit_slurm.yaml").read_text())
    assert set(settings) == set(OmegaConf.structured(SlurmQueueConf))
    given = {"gpus_per_node", "signal_delay_s", "cpus_per_task"}
    options = {key: settings[key] for key in given} | {
        "time": settings["timeout_min"],
        "mem": f"{settings['mem_gb']}GB",
    }
    script = f"""
from grpo.compose import run_command

def show():
    from submitit.slurm.slurm import _make_sbatch_string
    print(_make_sbatch_string(command="python job.py", folder={str(tmp_path)!r}, **{options!r}))

run_command(show)
"""
    text = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "#SBATCH --signal=USR1@120" in text
    assert {"#SBATCH --gpus-per-node=1", "#SBATCH --time=1440"} <= set(text.splitlines())
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_every_launcher_and_sweeper_of_ours_composes():
    for part in ("launcher", "sweeper"):
        for file in (CONF_DIR / "hydra" / part).glob("*.yaml"):
            assert compose_config([f"hydra/{part}={file.stem}"]) == compose_config([])


@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None, reason="it is installed")
def test_a_launcher_that_is_not_installed_is_named_with_the_mend_and_nothing_is_made(tmp_path):
    refused = launch(*SWEEP, "hydra/launcher=ray", cwd=tmp_path)
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, [])
    assert refused.stderr == "error: hydra/launcher=ray needs: pip install -e '.[sweeps]'\n"
