"""What a launch decides before Hydra starts: its folder, its config, or that it is refused."""

import json
import shutil

import pytest
import yaml

from grpo.config.migrations import VERSION
from grpo.runs.folder import RunFolder
from tests.conftest import SMALL_RUN
from tests.launches import SETTINGS, Launch, launch, start, wait_for_step

QUICK = [each for each in SMALL_RUN if not each.startswith("grpo.num_steps")]
QUICK += ["grpo.num_steps=1", "eval.before=false", "eval.after=false", "preflight=false"]
# An experiment that does not choose the hardware.
MINE = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: arithmetic
name: mine
grpo: {num_steps: 1, batch_size: 2, num_generations: 2, max_completion_length: 8}
data: {system_prompt: null}
eval: {before: false, after: false}
preflight: false
"""


@pytest.fixture
def own(tmp_path):
    """A folder with a config and an experiment of the user."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(MINE)
    (tmp_path / "own" / "my.yaml").write_text("defaults: [config, {override experiment: mine}]\nseed: 7\n")
    return tmp_path / "own"


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def configs(cwd):
    found = [yaml.safe_load(file.read_text()) for file in cwd.glob("outputs/**/config.yaml")]
    return [each for each in found if "version" in each]  # skips the files that Hydra writes to .hydra/


@pytest.mark.slow
def test_two_runs_or_sweeps_launched_at_the_same_moment_get_two_folders(tmp_path):
    for several in ([], ["-m", "hydra/launcher=basic"]):
        both = [Launch(*several, *QUICK, f"seed={seed}", cwd=tmp_path) for seed in (1, 2)]
        for each in both:
            assert each.wait().returncode == 0, each.stderr
    runs = sorted(tmp_path.glob("outputs/quickstart/*/config.yaml"))
    jobs = sorted(tmp_path.glob("outputs/sweeps/*/*/config.yaml"))
    for files in (runs, jobs):
        assert len({file.parents[1 if files is jobs else 0] for file in files}) == 2
        assert {yaml.safe_load(file.read_text())["seed"] for file in files} == {1, 2}


def test_resume_auto_starts_a_run_in_a_missing_folder_and_does_nothing_once_it_has_finished(tmp_path):
    first = launch(*QUICK, "resume=auto", "run_dir=run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = contents(tmp_path / "run")
    again = launch("experiment=quickstart", "resume=auto", "run_dir=run", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "run has finished already: nothing to do\n"), again.stderr
    assert contents(tmp_path / "run") == before


def test_a_refused_launch_changes_nothing_in_the_folder_of_another_run(tmp_path):
    run = tmp_path / "run"
    first = start(run, "grpo.num_steps=4000", "seed=1")
    wait_for_step(run, 1)
    recorded = contents(run / ".hydra")
    refused = launch(*SETTINGS, f"run_dir={run}", "seed=2", cwd=tmp_path)
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    first.kill()
    first.wait()
    assert (refused.returncode, resumed.returncode) == (2, 2)
    assert "already contains a run; resume it: resume=true" in refused.stderr
    assert "is in use by another process" in resumed.stderr
    assert contents(run / ".hydra") == recorded
    other = launch(*SETTINGS, "grpo.num_steps=4000", "resume=true", f"run_dir={run}", "seed=2", cwd=tmp_path)
    assert (other.returncode, "seed: 1 -> 2" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.device_map=cuda"], "model.device_map=cuda: torch sees no CUDA device here; use model.device_map=auto"),
        (["data.path=missing.jsonl", "data=jsonl"], "missing.jsonl"),
        (["name=../../elsewhere"], "name=../../elsewhere: must be the name of a folder below outputs/, without .."),
        (["name='\\${oc.env:HOME}'"], "the path of a run or sweep must not contain ${; choose another one"),
        (["run_dir='a\\${b}'"], "a${b}: the path of a run or sweep must not contain ${"),
        (["-m", "seed=1,2", "sweep_dir='a\\${b}'"], "a${b}: the path of a run or sweep must not contain ${"),
        (["resume=true"], "resume=true: no unfinished run below outputs/; name one with run_dir="),
        (["run_dir=mine/launch.log"], "mine/launch.log is not a folder; choose another one"),
        (["resume=auto", "run_dir=mine/launch.log"], "mine/launch.log is not a folder; choose another one"),
        (["run_dir=mine"], "mine is not empty (it holds .hydra); choose a new or an empty folder"),
        (["-m", "sweep_dir=mine", "seed=1,2"], "mine is not empty (it holds .hydra); choose a new or an empty folder"),
        (["-m", "run_dir=mine", "seed=1,2"], "run_dir names the folder of one run; that of a sweep is sweep_dir="),
        (["-m", "run_dir=mine,other"], "run_dir names the folder of one run; that of a sweep is sweep_dir="),
        (["-m", "seed=1,2", "hydra.run.dir=mine"], "hydra.run.dir names the folder of one run"),
        (["sweep_dir=mine"], "sweep_dir names the folder of a sweep: add -m, or name that of a run with run_dir="),
        (["-m", "seed=1,2,1"], "seed=1 is given 2 times: give each value once"),
        (["-m", "grpo.beta=0.1,1e-1"], "grpo.beta=0.1 is given 2 times"),
        (
            ["-m", "tracking=disabled,wandb", "tracking.mode=offline"],
            "tracking=disabled and tracking=wandb are the same",
        ),
        (["-m", "resume=true,false"], "resume concerns the whole sweep, so it has one value"),
        (["-m", "sweep_dir=mine,other"], "sweep_dir concerns the whole sweep"),
        (["-m", "until_step=1,2"], "until_step concerns the whole sweep"),
        (["-m", "seed=glob(*)"], "no job: seed=glob(*) matches no choice of a group"),
        (["-m", "tracking=glob(zzz*)"], "tracking=glob(zzz*) matches no choice of a group"),
        (["-m", "hardware=cpu,a100_80gb"], "hardware.device=cuda: torch sees no CUDA device here"),
        (["-m", "model.device_map=cpu,cuda:1"], "model.device_map=cuda:1: torch sees no CUDA device here"),
        (["-m", "data=jsonl", "data.path=mine,missing"], "data.path=mine: there is no train.jsonl in it"),
        (["-m", "model.name=tiny,./missing"], "model.name=./missing is neither a local folder nor a model"),
        (["--package", "grpo"], "--package and --resolve say what --cfg shows: add --cfg job"),
        (
            ["-m", "plan=true", "hydra/sweeper=halving", "grpo.num_steps=2,9"],
            "halving compares arms after equal steps: leave grpo.num_steps out",
        ),
        (
            ["-m", "seed=1,2", "hydra.sweep.subdir=mine_${hydra.job.num}"],
            "hydra.sweep.subdir=mine_${hydra.job.num}: must begin with ${hydra.job.num}, by which jobs are found",
        ),
        (["--experimental-rerun", "x"], "--experimental-rerun: continue a run with resume=true run_dir="),
        (["--config-dir", "nowhere"], "--config-dir=nowhere: there is no such folder"),
        (["grpo.beta=0.5", "objective.beta=0.1"], "grpo.beta: the objective has its own, objective.beta=0.1; set that"),
    ],
)
def test_an_impossible_launch_is_refused_with_its_reason_and_leaves_all_files_unchanged(tmp_path, arguments, said):
    for name in (".hydra/config.yaml", "launch.log", "status.json", "final_model/weights", "notes.tmp"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("the user's")
    before = contents(tmp_path)
    refused = launch(*QUICK, *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert "interpolation" not in refused.stderr
    assert contents(tmp_path) == before
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_config_of_the_user_is_found_by_searchpath_or_config_dir_and_works_with_hardware_auto(tmp_path, own):
    search = f"hydra.searchpath=[file://{own}]"
    searched = [search, "experiment=mine"]
    named = ["--config-dir", own, "--config-name", "my"]
    sweep = ["-m", "grpo.mu=1,2"]
    for arguments in (searched, [*sweep, *named]):
        planned = launch(*arguments, "plan=true", cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert ("all 2 runs" in planned.stdout) == ("-m" in arguments)
        assert not (tmp_path / "outputs").exists()
    for arguments in (searched, named, [*sweep, *searched, "hydra/launcher=basic"], [*sweep, *named]):
        done = launch(*arguments, "tracking=disabled", cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
    begun = [json.loads(file.read_text().splitlines()[0]) for file in tmp_path.rglob("launches.jsonl")]
    flags = ["--config-dir", str(tmp_path / own), "--config-name", "my"]
    assert sorted(each.get("flags", []) for each in begun) == [[], [], [], flags, flags, flags]
    found = configs(tmp_path)
    seeds = sorted((each["seed"], each["grpo"]["mu"]) for each in found)
    assert seeds == [(1, 1), (1, 1), (1, 2), (7, 1), (7, 1), (7, 2)]
    assert {(each["name"], each["hardware"]["device"], each["grpo"]["batch_size"]) for each in found} == {
        ("mine", "cpu", 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_config_of_the_user_reaches_the_jobs_of_other_launchers(tmp_path, own, cold, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    search = [f"hydra.searchpath=[file://{own}]", "experiment=mine"]
    place = search if launcher == "joblib" else ["--config-dir", own, "--config-name", "my"]
    sweep = ["-m", "grpo.mu=1,2", f"hydra/launcher={launcher}", "tracking=disabled"]
    done = cold(*sweep, *place, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert sorted((each["name"], each["grpo"]["mu"]) for each in configs(tmp_path)) == [("mine", 1), ("mine", 2)]


@pytest.mark.slow
def test_a_sweep_can_be_requested_before_or_after_its_values_or_by_hydra_mode(tmp_path):
    for arguments in (["seed=1,2", "-m"], ["-m", "seed=1,2"], ["seed=1,2", "hydra.mode=MULTIRUN"]):
        planned = launch(*QUICK[:1], *arguments, *QUICK[1:], "plan=true", cwd=tmp_path)
        assert (planned.returncode, "all 2 runs" in planned.stdout) == (0, True), planned.stderr


def test_an_experiment_chooses_the_launcher_of_a_sweep_unless_the_experiment_itself_is_swept(tmp_path, own):
    experiment = own / "experiment" / "mine.yaml"
    experiment.write_text(
        experiment.read_text().replace("name: mine", "  - override /hydra/launcher: basic\nname: mine")
    )
    shown = launch("--config-dir", own, "experiment=mine", "--info", "defaults", cwd=tmp_path)
    assert "hydra/launcher/basic" in shown.stdout and "hydra/launcher/local" not in shown.stdout
    sweep = ["-m", "--config-dir", own, "experiment=quickstart,mine"]
    refused = launch(*sweep, cwd=tmp_path)
    assert (refused.returncode, [each.name for each in tmp_path.iterdir()]) == (2, ["own"])
    assert "experiment=mine sets hydra.launcher, which is one for all jobs of a sweep" in refused.stderr
    planned = launch(*sweep, "hydra/launcher=basic", "plan=true", cwd=tmp_path)
    assert (planned.returncode, "all 2 runs" in planned.stdout) == (0, True), planned.stderr


def test_hydra_flags_that_start_no_run_pass_through(tmp_path):
    config = [*QUICK, "--cfg", "job"]
    beside = ["--config-path", "conf", *config]
    for arguments in (config, beside, [*QUICK, "--info", "searchpath"], ["--hydra-help"], ["--help"]):
        shown = launch(*arguments, cwd=tmp_path)
        assert (shown.returncode, list(tmp_path.iterdir())) == (0, []), shown.stderr
        assert shown.stdout


def test_the_first_command_line_of_a_run_is_recorded_in_its_folder(finished_run):
    (first,) = (json.loads(line) for line in (finished_run / "launches.jsonl").read_text().splitlines())
    assert first["overrides"] == [*SMALL_RUN, "optimizer.lr=0.001", "eval.every=1"]
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["version"] == VERSION
    assert not {"resume", "run_dir", "fork", "plan", "sweep", "sweep_dir", "until_step"} & config.keys()


@pytest.mark.slow
def test_hydra_run_dir_and_sweep_dir_set_the_folder_also_with_interpolation_or_in_an_experiment(tmp_path, own):
    done = launch(*QUICK, "name=named", "hydra.run.dir=r_${name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r_named" / "final_model").exists()
    experiment = own / "experiment" / "mine.yaml"
    experiment.write_text(
        experiment.read_text() + "hydra: {run: {dir: 'scratch/${name}'}, sweep: {dir: scratch/sweep}}\n"
    )
    sweep = ["-m", "seed=1,2", "hydra/launcher=basic"]
    for several, place in ([], "scratch/mine"), (sweep, "scratch/sweep/0_seed_1"):
        done = launch(*several, "--config-dir", own, "experiment=mine", "tracking=disabled", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / place / "final_model").exists()


def test_a_time_interpolation_in_a_name_is_resolved_only_once(tmp_path):
    done = launch(*QUICK, "name='${now:%f}'", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (config,) = configs(tmp_path)
    assert (tmp_path / "outputs" / config["name"]).exists()


def test_a_run_killed_before_its_first_step_is_resumed_by_the_same_command(tmp_path):
    command = [*QUICK, "run_dir=run", "resume=auto"]
    killed = launch(*command, cwd=tmp_path, fault=("grpo.training.train.restore", "1", "kill"))
    assert killed.returncode == -9
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [each["overrides"] for each in RunFolder(tmp_path / "run").launches()] == [command, command]


def test_a_refused_resume_changes_nothing_in_the_folder(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    (run / "launch.log").unlink()  # not compared, since a refusal is written to it
    before = contents(run)
    for change in ("grpo.beta=0.5", "grpo.num_steps=1"):
        refused = launch("resume=true", "run_dir=run", change, cwd=tmp_path)
        (run / "launch.log").unlink(missing_ok=True)
        assert refused.returncode == 2
        after = contents(run)
        assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == set()


def test_a_sweep_whose_jobs_never_start_leaves_no_files(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    tpe = ["hydra/sweeper=tpe", "optimizer.lr=interval(1e-6,1e-4)", "hydra.sweeper.sampler._target_=nope.Sampler"]
    refused = launch("-m", *QUICK, *tpe, cwd=tmp_path)
    assert refused.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_fork_can_be_started_again_in_the_same_folder(finished_run, tmp_path):
    command = ["fork=true", f"run_dir={finished_run}", "grpo.num_steps=3", "hydra.run.dir=fork"]
    killed = launch(*command, cwd=tmp_path, fault=("grpo.runs.folder.RunFolder.write_config", "1", "kill"))
    assert killed.returncode == -9
    assert (tmp_path / "fork" / "checkpoints").exists()
    done = launch(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_fork_cannot_change_grpo_beta_where_the_objective_sets_its_own_beta(finished_run, tmp_path):
    parent = shutil.copytree(finished_run, tmp_path / "parent", symlinks=True)
    text = (parent / "config.yaml").read_text()
    (parent / "config.yaml").write_text(text.replace("\n  beta: null\n", "\n  beta: 0.05\n"))
    overrides = ("grpo.num_steps=3", "grpo.beta=0.2", "accept_changes=true")
    refused = launch("fork=true", "run_dir=parent", *overrides, cwd=tmp_path)
    assert refused.returncode == 2
    assert "grpo.beta: the objective has its own, objective.beta=0.05" in refused.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["parent"]
