"""Hydra's real launchers and sweepers: each launcher gives the same sweep, bit for bit."""

import importlib.util
import os
import subprocess
import sys

import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from grpo.config.compose import compose_config
from grpo.config.paths import CONF_DIR
from grpo.runs.gpu_queue import LOCAL_LAUNCHERS, must_choose_gpu
from grpo.runs.sweep_folder import SweepFolder
from tests.launches import ROOT, launch, rows
from tests.sweeps.test_sweep import QUICK

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


@pytest.mark.slow  # the default launcher is tested in tests/sweeps/test_sweep.py
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("joblib", marks=installed("hydra_joblib_launcher")),
        pytest.param("submitit_local", marks=installed("hydra_submitit_launcher")),
        pytest.param("ray_cluster", marks=installed("hydra_ray_launcher")),  # not in [dev], since it is large
    ],
)
def test_each_launcher_gives_the_same_runs(basic, tmp_path, launcher):
    # A plain process: one forked from the tests' server does not run the code that ends joblib's workers.
    command = [sys.executable, ROOT / "launch.py", *SWEEP, f"hydra/launcher={launcher}", "sweep_dir=sweep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower().replace("warning authentication_token", "")
    jobs = SweepFolder(tmp_path / "sweep").jobs()
    assert jobs == SweepFolder(basic).jobs()
    for job in jobs:
        assert rows(tmp_path / "sweep" / job["folder"]) == rows(basic / job["folder"])
    assert (tmp_path / "sweep" / "report.html").exists()


@pytest.mark.parametrize("plugin", ["launcher/local", "sweeper/halving"])
def test_a_setting_that_a_plugin_does_not_have_is_refused_when_hydra_builds_it(plugin):
    settings = yaml.safe_load((CONF_DIR / "hydra" / f"{plugin}.yaml").read_text())
    plain = {key: None if str(value).startswith("${") else value for key, value in settings.items()}
    instantiate(plain)
    with pytest.raises(InstantiationException, match="unexpected keyword argument 'foo'"):
        instantiate({**plain, "foo": 1})


@pytest.mark.slow
@installed("hydra_optuna_sweeper")
def test_optuna_maximizes_the_outcome_and_a_resumed_sweep_has_the_same_trials(tmp_path):
    command = [
        "-m",
        *(each for each in QUICK if each != "eval.after=false"),
        "eval.max_problems=40",
        "grpo.num_steps=2",
    ]
    command += ["hydra/sweeper=tpe", "optimizer.lr=tag(log,interval(1e-6,1e-3))", "hydra/launcher=basic"]
    command += ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=1"]
    done = launch(*command, "sweep_dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = SweepFolder(tmp_path / "whole").jobs()
    best = yaml.safe_load((tmp_path / "whole" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(job["accuracy"] for job in jobs)

    fault = ("grpo.training.groups.group_keys", "5", "kill")  # the third trial
    assert launch(*command, "sweep_dir=killed", cwd=tmp_path, fault=fault).returncode == -9
    again = launch(*command, "sweep_dir=killed", "resume=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert SweepFolder(tmp_path / "killed").jobs() == jobs
    for job in jobs:
        assert rows(tmp_path / "killed" / job["folder"]) == rows(tmp_path / "whole" / job["folder"])


@installed("hydra_submitit_launcher")
def test_the_script_for_slurm_has_the_configured_settings(tmp_path):
    settings = yaml.safe_load((CONF_DIR / "hydra" / "launcher" / "slurm.yaml").read_text())
    given = {"gpus_per_node", "signal_delay_s", "cpus_per_task"}
    options = {key: settings[key] for key in given} | {
        "time": settings["timeout_min"],
        "mem": f"{settings['mem_gb']}GB",
    }
    script = f"""
from grpo.launch.process import run_command

def show():
    from submitit.slurm.slurm import _make_sbatch_string
    print(_make_sbatch_string(command="python job.py", folder={str(tmp_path)!r}, **{options!r}))

run_command(show)
"""
    text = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "#SBATCH --signal=USR1@120" in text
    assert {"#SBATCH --gpus-per-node=1", "#SBATCH --time=1440"} <= set(text.splitlines())
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize(
    "choice",
    [
        "launcher=local",
        "sweeper=halving",
        pytest.param("launcher=slurm", marks=installed("hydra_submitit_launcher")),
        pytest.param("launcher=ray_cluster", marks=installed("hydra_ray_launcher")),
        pytest.param("sweeper=tpe", marks=installed("hydra_optuna_sweeper")),
    ],
)
def test_every_launcher_and_sweeper_of_the_suite_composes(choice):
    assert compose_config([f"hydra/{choice}"]) == compose_config([])


FOREIGN = """
import sys
import hydra

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    print("job", cfg.x, sorted({"torch", "grpo"} & set(sys.modules)))
    return cfg.x

from hydra.core.config_store import ConfigStore
ConfigStore.instance().store("config", {"x": 1})
main()
"""


@installed("hydra_joblib_launcher")
@installed("hydra_optuna_sweeper")
def test_other_hydra_programs_still_find_their_plugins_and_import_nothing_of_the_suite(tmp_path):
    (tmp_path / "foreign.py").write_text(FOREIGN)
    arguments = ["-m", "x=1,2", "hydra/launcher=joblib", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1"]
    done = subprocess.run(
        [sys.executable, "foreign.py", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[]" in done.stdout and "'grpo'" not in done.stdout
    assert "hydra_grpo" not in done.stderr


def test_hydra_finds_our_plugins_without_importing_the_project():
    script = (
        "import sys; from hydra.core.plugins import Plugins; names = Plugins.instance().class_name_to_class;"
        "print(sorted(n for n in names if 'grpo' in n), {'torch', 'grpo'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = "['hydra_plugins.hydra_grpo.HalvingSweeper', 'hydra_plugins.hydra_grpo.LocalLauncher']"
    assert done.stdout == f"{names} set()\n"


@pytest.mark.skipif(importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None, reason="it is installed")
@pytest.mark.parametrize("name", ["ray", "ray_cluster"])
def test_a_launcher_that_is_not_installed_is_refused_with_the_command_that_installs_it(tmp_path, name):
    refused = launch(*SWEEP, f"hydra/launcher={name}", cwd=tmp_path)
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, [])
    assert refused.stderr == "error: hydra/launcher=ray needs: pip install -e '.[sweeps]'\n"


def test_an_unknown_launcher_is_refused_with_a_list_of_the_existing_ones(tmp_path):
    refused = launch(*SWEEP, "hydra/launcher=lokal", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: there is no hydra/launcher=lokal; choose one of ")
    assert "basic, " in refused.stderr and " Did you mean hydra/launcher=local?" in refused.stderr


@installed("hydra_optuna_sweeper")
def test_a_sweeper_that_minimizes_the_outcome_is_refused(tmp_path):
    refused = launch(*SWEEP, "hydra/sweeper=optuna", cwd=tmp_path)
    assert (refused.returncode, list(tmp_path.iterdir())) == (2, [])
    assert refused.stderr == (
        "error: hydra.sweeper.direction=minimize: the outcome of a run is to be maximized; use hydra/sweeper=tpe, or "
        "hydra.sweeper.direction=maximize\n"
    )


THIRD = """
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore


class ThirdLauncher(BasicLauncher):
    pass


ConfigStore.instance().store("third", {"_target_": "hydra_plugins.third.ThirdLauncher"}, group="hydra/launcher")
"""


@pytest.mark.slow
def test_a_third_party_launcher_can_run_a_sweep(tmp_path):
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "third.py").write_text(THIRD)
    command = [sys.executable, ROOT / "launch.py", "-m", *QUICK, "grpo.num_steps=1", "hydra/launcher=third"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [*command, "seed=1", "sweep_dir=sweep"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [job["state"] for job in SweepFolder(tmp_path / "sweep").jobs()] == ["finished"]


def test_jobs_choose_a_gpu_themselves_only_where_their_launcher_is_known_to_assign_none():
    config = compose_config(["hardware=auto"])
    chosen = {
        name: must_choose_gpu(config, target)
        for name, target in {
            "local": "hydra_plugins.hydra_grpo.LocalLauncher",
            "slurm": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
            "third": "hydra_plugins.third.ThirdLauncher",
        }.items()
    }
    assert chosen == {"local": True, "slurm": False, "third": False}
    for target in LOCAL_LAUNCHERS:
        module, _, name = target.rpartition(".")
        if importlib.util.find_spec(module.rpartition(".")[0]):
            assert hasattr(importlib.import_module(module), name)  # it still has this name
