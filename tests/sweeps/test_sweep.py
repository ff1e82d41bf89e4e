"""Sweeps on one machine: jobs that are killed, stop signals, resuming, and the queue for GPUs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.runs.folder import RunFolder
from grpo.runs.gpu_queue import claim_gpu
from grpo.runs.sweep_folder import SweepFolder, newest_sweep
from grpo.sweeps.opening import points_of, with_params
from tests.launches import ROOT, Launch, launch, rows

QUICK = [
    "experiment=quickstart",
    "grpo.batch_size=2",
    "grpo.num_generations=4",
    "eval.before=false",
    "eval.after=false",
    "tracking=disabled",
    "preflight=false",
]
REWARDS = """
import os
import signal
import time
from pathlib import Path


def die(completions, at, **columns):
    if Path("armed").exists() and Path("armed").read_text() == str(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)


def slow(completions, **columns):
    Path("begun").touch()
    time.sleep(0.3)
    return [0.0] * len(completions)
"""

HIDE = """
from pathlib import Path


def hide(completions, **columns):
    if not Path("hidden").exists():
        Path("other").rename("hidden")
    return [0.0] * len(completions)
"""


@pytest.fixture
def cwd(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    return tmp_path


def begun(cwd):
    return [file for file in cwd.glob("outputs/sweeps/*/*/metrics/metrics.jsonl") if file.stat().st_size]


def sweep_of(cwd):
    (folder,) = (cwd / "outputs" / "sweeps").iterdir()
    return SweepFolder(folder)


def test_a_killed_job_does_not_stop_the_others_and_resume_runs_only_that_job_again(cwd):
    (cwd / "armed").write_text("1")
    component = "+reward.components.die={_target_: mine.die, weight: 0, isolate: false}"
    command = ["-m", *QUICK, component, "grpo.num_steps=2", "+reward.components.die.at=1,2"]
    failed = launch(*command, cwd=cwd)
    assert failed.returncode == 1
    sweep = sweep_of(cwd)
    assert [job["state"] for job in sweep.jobs()] == ["failed", "finished"]
    assert sweep.record()["state"] == "failed"
    assert "SIGKILL (possibly out of memory)" in sweep.jobs()[0]["error"]
    assert "Traceback" not in failed.stdout + failed.stderr
    assert "job 0 failed: its process ended with SIGKILL" in failed.stdout
    written = {job["folder"]: (sweep.path / job["folder"] / "status.json").stat().st_mtime_ns for job in sweep.jobs()}

    (cwd / "armed").unlink()
    again = launch(*command, "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert sweep_of(cwd).record()["state"] == "finished"
    changed = {name for name, at in written.items() if (sweep.path / name / "status.json").stat().st_mtime_ns != at}
    assert changed == {sweep.jobs()[0]["folder"]}
    assert f"{sweep.jobs()[1]['folder']} has finished already: nothing to do" in again.stdout
    assert [row["step"] for row in rows(sweep.path / sweep.jobs()[0]["folder"])] == [1, 2]


@pytest.mark.slow
def test_a_broken_file_of_one_job_does_not_affect_the_others_when_the_sweep_is_resumed(cwd):
    command = ["-m", *QUICK, "seed=1,2"]
    paused = launch(*command, "grpo.num_steps=2", "until_step=1", cwd=cwd)
    assert paused.returncode == 0, paused.stderr
    lines = [line for line in paused.stdout.splitlines() if " after " in line and line.startswith("job ")]
    assert re.fullmatch(r"job 1 of 2 \(seed=1\): paused after \d+ s, reward .*; about \d+ s left for 1 more", lines[0])
    assert re.fullmatch(r"job 2 of 2 \(seed=2\): paused after \d+ s, reward \S+", lines[1])
    sweep = sweep_of(cwd)
    broken, other = (sweep.path / job["folder"] for job in sweep.jobs())
    (broken / "status.json").write_text("{")
    (broken / ".hydra" / "overrides.yaml").write_bytes(b"\xff\x00")
    done = launch(*command, "grpo.num_steps=2", "resume=true", cwd=cwd)
    assert done.returncode == 1
    assert [job["state"] for job in sweep.jobs()] == ["unreadable", "finished"]
    assert "status.json is not valid JSON" in done.stdout
    assert len(rows(other)) == 2


@pytest.mark.slow
def test_a_stop_signal_reaches_the_jobs_which_save_and_can_be_resumed(cwd):
    component = "+reward.components.slow={_target_: mine.slow, weight: 0}"
    command = ["-m", *QUICK, component, "grpo.num_steps=4", "seed=1,2", "hydra.launcher.jobs_at_once=2"]
    process = Launch(*command, cwd=cwd)
    wait_for(lambda: len(begun(cwd)) == 2)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait()
    assert stopped.returncode == 143
    sweep = sweep_of(cwd)
    assert [job["state"] for job in sweep.jobs()] == ["interrupted"] * 2
    assert f"resume    python {ROOT / 'launch.py'} -m" in stopped.stdout
    done = [rows(sweep.path / job["folder"]) for job in sweep.jobs()]
    assert all(1 <= len(each) < 4 for each in done)
    again = launch(*command, "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    for job, before in zip(sweep.jobs(), done, strict=True):
        assert rows(sweep.path / job["folder"])[: len(before)] == before
        assert len(rows(sweep.path / job["folder"])) == 4
        assert "resuming " in (sweep.path / job["folder"] / "console.log").read_text()


@pytest.mark.slow
def test_jobs_at_once_share_the_cores_unless_the_user_sets_the_threads(cwd):
    cores = len(os.sched_getaffinity(0))
    command = ["-m", *QUICK, "grpo.num_steps=1", "hardware.threads=null", "hydra.launcher.jobs_at_once=2"]
    done = launch(*command, "seed=1,2", "sweep_dir=shared", cwd=cwd)
    assert done.returncode == 0, done.stderr
    threads = max(1, cores // 2)
    assert f"2 jobs at once on {cores} cores: each uses {threads} unless hardware.threads is set" in done.stdout
    jobs = SweepFolder(cwd / "shared").jobs()
    assert [threads_of(cwd / "shared" / job["folder"]) for job in jobs] == [threads, threads]


@pytest.mark.slow
def test_the_threads_that_the_user_sets_are_kept_for_jobs_at_once(cwd):
    command = ["-m", *QUICK, "grpo.num_steps=1", "hydra.launcher.jobs_at_once=2", "sweep_dir=own"]
    cores = len(os.sched_getaffinity(0))
    done = launch(*command, "hardware.threads=null,3", cwd=cwd, OMP_NUM_THREADS=str(cores))
    assert done.returncode == 0, done.stderr
    assert "jobs at once on" not in done.stdout
    jobs = SweepFolder(cwd / "own").jobs()
    assert [threads_of(cwd / "own" / job["folder"]) for job in jobs] == [cores, 3]


def threads_of(run_dir):
    return RunFolder(run_dir).frozen_config().hardware.threads


@pytest.mark.slow
def test_a_signal_for_one_job_stops_only_that_job(cwd):
    (cwd / "mine.py").write_text(REWARDS + "\n\ndef stop(completions, at, **columns):\n    os.kill(os.getpid(), at)\n")
    component = f"+reward.components.stop={{_target_: mine.stop, weight: 0, isolate: false, at: {int(signal.SIGTERM)}}}"
    done = launch("-m", *QUICK, component, "grpo.num_steps=2", "seed=1,2", cwd=cwd)
    assert done.returncode == 1
    assert [job["state"] for job in sweep_of(cwd).jobs()] == ["interrupted", "interrupted"]  # the second started too


def test_jobs_end_when_their_launcher_is_killed(cwd):
    component = "+reward.components.slow={_target_: mine.slow, weight: 0}"
    process = Launch("-m", *QUICK, component, "grpo.num_steps=50", "seed=1,2", cwd=cwd)
    wait_for(lambda: begun(cwd))
    process.kill()
    wait_for(lambda: sweep_of(cwd).jobs()[0]["state"] != "running")
    assert [job["state"] for job in sweep_of(cwd).jobs()] == ["interrupted", "pending"]


def test_impossible_values_are_refused_before_anything_is_written(cwd):
    for bad in (
        "grpo.epsilon=0.1,2",
        "grpo.num_generations=2,1",
        "model=tiny,nope",
        "resume=ture",
        "hydra.launcher.jobs_at_once=-1",
        "reward.components.format._target_=nope.score",
    ):
        refused = launch("-m", *QUICK, "grpo.num_steps=1", "seed=1,2", bad, cwd=cwd)
        assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (2, 1, ""), bad
        assert not (cwd / "outputs").exists()


@pytest.mark.slow
def test_a_job_that_cannot_start_is_recorded_with_its_values_and_can_be_started_again(cwd):
    for folder in ("mine", "other"):
        shutil.copytree(ROOT / "tests" / "sums", cwd / folder)
    # The data set of the second job disappears while the first one runs.
    (cwd / "hide.py").write_text(HIDE)
    component = "+reward.components.hide={_target_: hide.hide, weight: 0}"
    command = ["-m", *QUICK, "hydra/launcher=basic", component, "grpo.num_steps=1", "data=jsonl"]
    command += ["data.path=mine,other", "data.system_prompt=null"]
    refused = launch(*command, cwd=cwd)
    assert refused.returncode == 1
    jobs = sweep_of(cwd).jobs()
    assert [job["state"] for job in jobs] == ["finished", "failed"]
    assert "data.path=other" in jobs[1]["error"]
    assert jobs[1]["overrides"] == ["data.path=other"]
    assert not (sweep_of(cwd).path / jobs[1]["folder"] / "config.yaml").exists()
    (cwd / "hidden").rename(cwd / "other")
    again = launch(*command, "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr


def test_with_chdir_relative_paths_still_start_from_the_directory_of_the_launch(tmp_path):
    shutil.copytree(ROOT / "tests" / "sums", tmp_path / "sums")
    own = [
        *QUICK,
        "data=jsonl",
        "data.path=sums",
        "data.system_prompt=null",
        "grpo.num_steps=1",
        "hydra.job.chdir=true",
    ]
    single = launch(*own, "run_dir=run", cwd=tmp_path)
    assert single.returncode == 0, single.stderr
    assert RunFolder(tmp_path / "run").finished()
    done = launch("-m", *own, "seed=1", "hydra/launcher=basic", "sweep_dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [job["state"] for job in SweepFolder(tmp_path / "sweep").jobs()] == ["finished"]


@pytest.mark.parametrize(
    "logging", ["none", *(pytest.param(each, marks=pytest.mark.slow) for each in ("disabled", "stdout"))]
)
def test_hydras_other_choices_of_logging_work_and_write_no_log(tmp_path, logging):
    own = [*QUICK, "grpo.num_steps=1", f"hydra/job_logging={logging}", "hydra.output_subdir=null"]
    done = launch("-m", *own, "sweep_dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (job,) = SweepFolder(tmp_path / "sweep").jobs()
    assert job["state"] == "finished"
    assert not {".hydra", "launch.log"} & {each.name for each in (tmp_path / "sweep" / job["folder"]).iterdir()}


def test_a_group_can_be_swept_by_glob_and_jobs_can_be_named_by_their_number(tmp_path):
    own = [*QUICK, "grpo.num_steps=1", "hydra/launcher=basic", "hydra.sweep.subdir=${hydra.job.num}", "sweep_dir=sweep"]
    done = launch("-m", *own, "rollout=glob(*)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (job,) = SweepFolder(tmp_path / "sweep").jobs()
    assert (job["folder"], job["overrides"], job["state"]) == ("0", ["rollout=native"], "finished")


@pytest.mark.slow
def test_a_resumed_sweep_keeps_the_order_of_its_first_launch(cwd):
    """The order numbers the jobs, and determines which of two values of a key is used."""
    command = [*QUICK, "hydra/launcher=basic", "grpo.num_steps=1", "grpo.epsilon=0.3", "grpo.epsilon=0.1"]
    command.append("seed=shuffle(1,2)")
    first = launch("-m", *command, "grpo.beta=0,0.04", cwd=cwd)
    assert first.returncode == 0, first.stderr
    jobs, record = sweep_of(cwd).jobs(), sweep_of(cwd).record()
    assert [job["overrides"] for job in jobs] == record["planned"]
    assert all(RunFolder(sweep_of(cwd).path / job["folder"]).frozen_config().grpo.epsilon == 0.1 for job in jobs)
    again = launch("-m", "grpo.beta=0,0.04", *command, "checkpoint.keep_last=2", "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert sweep_of(cwd).jobs() == jobs
    assert again.stdout.count("has finished already: nothing to do") == 4
    assert len([path for path in sweep_of(cwd).path.iterdir() if path.is_dir()]) == 4


def test_another_sweep_is_not_mistaken_for_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    basic = OmegaConf.create({"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None})
    for name, overrides in (("1", ["seed=1,2", "grpo.mu=1"]), ("2", ["grpo.mu=1", "seed=1,2"]), ("3", ["seed=1,3"])):
        given = Overrides(overrides)
        SweepFolder(tmp_path / "outputs" / "sweeps" / name).begin(given, given.swept, points_of(given, basic))
    assert newest_sweep(Overrides(["seed=1,2", "resume=true", "grpo.mu=1"])).name == "2"
    assert newest_sweep(Overrides(["seed=1,2"])) is None
    for name, content in (("broken", "{"), ("of_another_version", '{"overrides": []}')):
        (tmp_path / "outputs" / "sweeps" / name).mkdir()
        (tmp_path / "outputs" / "sweeps" / name / "sweep.json").write_text(content)
    assert newest_sweep(Overrides(["seed=1,2", "grpo.mu=1"])).name == "2"
    sweep = SweepFolder(tmp_path / "outputs" / "sweeps" / "2")
    sweep.check_same(Overrides(["tracking=disabled", "seed=1,2", "grpo.mu=1", "checkpoint.every=7"]), "basic", True)
    with pytest.raises(ConfigError, match=r"is a sweep of other values; .* if you trust them: grpo\.mu=1"):
        sweep.check_same(Overrides(["seed=1,2", "grpo.mu=2"]), "basic", True)
    with pytest.raises(ConfigError, match="already contains a sweep; add resume=true"):
        sweep.check_same(Overrides(["seed=1,2", "grpo.mu=1"]), "basic", False)
    with pytest.raises(ConfigError, match="is a sweep with hydra/sweeper=basic"):
        sweep.check_same(Overrides(["seed=1,2", "grpo.mu=1"]), "halving", True)
    # A key that may change on resume may not change in a sweep over this key.
    swept = SweepFolder(tmp_path / "kept")
    points = [["checkpoint.every=1"], ["checkpoint.every=2"]]
    swept.begin(Overrides(["checkpoint.every=1,2"]), ["checkpoint.every"], points)
    with pytest.raises(ConfigError, match="is a sweep of other values"):
        swept.check_same(Overrides(["checkpoint.every=3,4"]), "basic", True)


def test_a_change_on_resume_is_kept_for_later_launches(tmp_path):
    sweep, first = SweepFolder(tmp_path), Overrides(["checkpoint.every=1", "grpo.mu=1", "seed=1,2"])
    points = [["seed=1"], ["seed=2"]]
    sweep.begin(first, ["seed"], points)
    again = Overrides(["seed=1,2", "grpo.mu=1", "checkpoint.every=50", "tracking.mode=offline", "resume=true"])
    second = sweep.continued(again)
    assert second.lines == ["checkpoint.every=50", "grpo.mu=1", "seed=1,2", "tracking.mode=offline", "resume=true"]
    sweep.begin(second, ["seed"], points)
    assert sweep.record()["overrides"] == second.lines[:-1]
    assert sweep.continued(Overrides(["seed=1,2", "grpo.mu=1"])).lines == second.lines[:-1]
    # The choice of a group replaces the earlier key of that group.
    group = sweep.continued(Overrides(["seed=1,2", "grpo.mu=1", "tracking=wandb"]))
    assert group.lines == ["checkpoint.every=50", "grpo.mu=1", "seed=1,2", "tracking=wandb"]


EXPERIMENT = """# @package _global_
defaults:
  - override /model: tiny
  - override /data: arithmetic
data: {system_prompt: null}
hydra: {sweeper: {params: {seed: "shuffle(1,2,3)"}}}
"""


@pytest.mark.slow
def test_a_sweep_can_be_described_by_an_experiment_of_the_user(cwd):
    """Its params are shuffled only once, resuming uses its config folders, and each job has its own name."""
    shutil.copytree(ROOT / "conf", cwd / "base")
    (cwd / "own" / "experiment").mkdir(parents=True)
    (cwd / "own" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    folders = ["--config-path", str(cwd / "base"), "--config-dir", "own"]
    command = [*folders, "-m", "experiment=mine", *QUICK[1:], "hydra/launcher=basic", "grpo.num_steps=1"]
    command += ["grpo.max_completion_length=8", "tracking.name=run_${seed}", "hardware=cpu"]
    done = launch(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    jobs, record = sweep_of(cwd).jobs(), sweep_of(cwd).record()
    assert sorted(job["overrides"] for job in jobs) == [[f"seed={n}"] for n in (1, 2, 3)]
    for job in jobs:
        (seed,) = (each.partition("=")[2] for each in job["overrides"])
        config = RunFolder(sweep_of(cwd).path / job["folder"]).frozen_config()
        assert (str(config.seed), config.tracking.name) == (seed, f"run_{seed}")
    assert record["flags"] == ["--config-path", str(cwd / "base"), "--config-dir", str(cwd / "own")]
    planned = launch(*command[:-1], "plan=true", cwd=cwd)
    assert (planned.returncode, planned.stdout.count("seed=")) == (0, 3), planned.stderr
    assert "tracking.name=run_${seed}" in record["overrides"]
    again = launch(*command, "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert sweep_of(cwd).jobs() == jobs
    assert len([path for path in sweep_of(cwd).path.iterdir() if path.is_dir()]) == 3


def test_two_trials_with_the_same_number_are_both_listed(tmp_path):
    sweep = SweepFolder(tmp_path)
    sweep.begin(Overrides(["optimizer.lr=interval(0,1)"]), ["optimizer.lr"], None)
    for name, state in (("0_optimizer.lr_0.5", "finished"), ("1_optimizer.lr_0.1", "finished"), ("1_x", "failed")):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).update_status(state=state)
    jobs = [(job["job"], job["folder"], job["state"]) for job in sweep.jobs()]
    assert jobs[1:] == [(1, "1_optimizer.lr_0.1", "finished"), (1, "1_x", "failed")]
    assert len(jobs) == 3


def test_swept_keys_are_those_with_several_values():
    overrides = ["grpo.mu=1", "+x.y=1,2", "seed=range(1,4)", "data.examples=[1,2]"]
    sweeper = OmegaConf.create({"params": {"grpo.beta": "0,0.1", "seed": "7,8"}})
    assert with_params(Overrides(overrides), sweeper).swept == ["grpo.beta", "x.y", "seed"]


CLAIM = """
import sys, time
from pathlib import Path
from grpo.runs.gpu_queue import claim_gpu
name = claim_gpu(2, Path(sys.argv[1]))
assert claim_gpu(2, Path(sys.argv[1])) == name  # once taken, it stays
print(name, flush=True)
time.sleep(60)
"""


def test_each_gpu_is_assigned_to_one_process_and_freed_when_that_process_ends(tmp_path):
    def claim(**environment):
        return subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    first, second = claim(CUDA_VISIBLE_DEVICES="3,GPU-7"), claim(CUDA_VISIBLE_DEVICES="3,GPU-7")
    got = {first.stdout.readline().strip(): first, second.stdout.readline().strip(): second}
    assert set(got) == {"3", "GPU-7"}
    third = claim(CUDA_VISIBLE_DEVICES="3,GPU-7")
    assert third.stdout.readline() == "waiting for one of the GPUs 3, GPU-7\n"
    got["GPU-7"].kill()
    assert third.stdout.readline() == "GPU-7\n"
    for process in (first, second, third):
        process.kill()
        process.wait()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from grpo.runs.gpu_queue import claim_gpu
claim_gpu(1, Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_gpu_is_freed_when_its_job_is_killed_even_if_a_child_process_of_the_job_still_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.runs.gpu_queue._held", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(job.stdout.readline())
    try:
        job.wait()
        started = time.monotonic()
        assert claim_gpu(1, tmp_path) == "0"
        assert time.monotonic() - started < 30  # not only when the child process ends
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_a_gpu_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert claim_gpu(0, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_wandb_names_and_tags_a_job_by_its_overrides(cwd):
    command = [
        "-m",
        *QUICK[:-2],
        "hydra/launcher=basic",
        "tracking=offline",
        "preflight=false",
        "grpo.num_steps=1",
        "grpo.beta=0,0.04",
    ]
    done = launch(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    for job in sweep_of(cwd).jobs():
        tracking = OmegaConf.load(sweep_of(cwd).path / job["folder"] / "config.yaml").tracking
        assert (tracking.name, tracking.tags, tracking.group) == (
            job["overrides"][0],
            job["overrides"],
            sweep_of(cwd).path.name,
        )


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_the_status_of_a_sweep_is_json_that_a_script_can_read(cwd):
    done = launch("-m", *QUICK, "hydra/launcher=basic", "grpo.num_steps=1", "seed=4,5", "sweep_dir=s", cwd=cwd)
    assert done.returncode == 0, done.stderr
    record = json.loads((cwd / "s" / "sweep.json").read_text())
    assert (record["state"], record["keys"], record["planned"]) == ("finished", ["seed"], [["seed=4"], ["seed=5"]])
    assert [(job["job"], job["folder"], job["step"]) for job in record["jobs"]] == [
        (0, "0_seed_4", 1),
        (1, "1_seed_5", 1),
    ]


def test_a_sweep_over_the_files_of_a_group_and_over_a_range(cwd):
    """Hydra's glob, exclude and range."""
    keys = ["objective=glob([c*,d*],exclude=d?_*)", "seed=range(1,3)"]
    done = launch("-m", *QUICK, *keys, "grpo.num_steps=1", "hydra/launcher=basic", "sweep_dir=own", cwd=cwd)
    assert done.returncode == 0, done.stderr
    jobs = SweepFolder(cwd / "own").jobs()
    assert [job["overrides"] for job in jobs] == [
        [f"objective={name}", f"seed={seed}"] for name in ("cispo", "dapo") for seed in (1, 2)
    ]
    objectives = [RunFolder(cwd / "own" / job["folder"]).frozen_config().objective for job in jobs]
    assert [each["surrogate"] for each in objectives] == ["cispo", "cispo", "clip", "clip"]
