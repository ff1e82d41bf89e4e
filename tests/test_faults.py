"""Faults that a run survives, each in a real process; tests/inject.py describes how they are caused."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from grpo.runs.checkpoint import find_damage, latest_checkpoint, load_state
from grpo.runs.stop_signals import STOP_SIGNALS, StopSignals
from grpo.training.trainer import Trainer
from tests.launches import (
    ROOT,
    SETTINGS,
    SHORT,
    STEPS,
    assert_same_run,
    grpo,
    launch,
    resume,
    rows,
    start,
    status,
    wait_for_step,
)

TRAINER = "grpo.training.trainer"
GROUPS = "grpo.training.groups"
RECORDER = "grpo.training.recorder.Recorder"


def checkpoint_steps(run_dir):
    return [int(path.name[-6:]) for path in sorted((run_dir / "checkpoints").glob("step_*"))]


SLOW = pytest.mark.slow  # rows of large tables, of which a plain test run takes only a sample

# Killed at any moment.


@pytest.mark.parametrize(
    ("place", "call", "arguments"),
    [
        pytest.param(f"{GROUPS}.group_keys", "1", [], id="before the first step", marks=SLOW),
        pytest.param(f"{RECORDER}.step", "1", [], id="before the first step is written down", marks=SLOW),
        pytest.param(f"{TRAINER}.apply_gradient", "6", [], id="between the updates of a batch"),
        pytest.param(f"{GROUPS}.group_keys", "7", ["checkpoint.every=3"], id="at the end of an epoch", marks=SLOW),
        pytest.param(f"{GROUPS}.group_keys", "6", ["checkpoint.every=5"], id="in the middle of an epoch", marks=SLOW),
        pytest.param(f"{GROUPS}.group_keys", "5", [], id="at the end of an iteration", marks=SLOW),
        pytest.param(f"{GROUPS}.group_keys", "8", ["checkpoint.every=7"], id="before the last step", marks=SLOW),
        pytest.param("grpo.runs.folder.RunFolder.save_final_model", "1", [], id="after the last step", marks=SLOW),
        pytest.param("grpo.analysis.charts.write_summary", "1", [], id="while the charts are drawn", marks=SLOW),
    ],
)
def test_a_run_killed_at_a_given_place_and_resumed_is_bitwise_equal(tmp_path, straight, place, call, arguments):
    run_dir = tmp_path / "run"
    killed = start(run_dir, *arguments, fault=(place, call, "kill")).wait()
    assert killed.returncode == -9
    if place != "grpo.analysis.charts.write_summary":
        resumed = resume(run_dir)
        assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


def kill_at_random(run_dir, rng, kills, seconds):
    """Start a run and kill it after a random time, `kills` times with the same command; then let it finish.

    Returns how many launches were still running when they were killed.
    """
    found_at_work = 0
    for _ in range(kills):
        process = start(run_dir, "resume=auto", *OFTEN)
        time.sleep(rng.uniform(0, seconds))
        process.kill()
        found_at_work += process.wait().returncode == -9
    finished = start(run_dir, "resume=auto", *OFTEN).wait()
    assert finished.returncode == 0, finished.stderr
    return found_at_work


OFTEN = ["checkpoint.overlap=true", "checkpoint.every=1"]  # so that many kills happen while a checkpoint is written


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_several_times_at_random_moments_is_bitwise_equal(tmp_path, straight, seed):
    assert kill_at_random(tmp_path / "run", random.Random(seed), kills=3, seconds=1.5) > 0
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 124))
def test_a_run_killed_many_times_at_random_moments_is_bitwise_equal(tmp_path, straight, seed):
    rng = random.Random(seed)
    kills = kill_at_random(tmp_path / "run", rng, kills=rng.randint(3, 10), seconds=2.5)
    assert kills > 0
    assert_same_run(tmp_path / "run", straight)
    print(f"{kills} kills, every byte equal")  # shown with -rP


# Errors.


@pytest.mark.parametrize(
    ("place", "call", "saved"),
    [
        ("grpo.training.groups.score_completions", "6x", 5),
        pytest.param("grpo.training.trainer.sample_completions", "6x", 5, marks=SLOW),
        pytest.param("grpo.training.groups.group_keys", "6x", 5, marks=SLOW),
        pytest.param("grpo.training.groups.group_keys", "5x", 4, marks=SLOW),
        pytest.param("grpo.training.trainer.all_logps", "6x", 5, marks=SLOW),
        ("grpo.training.trainer.accumulate_gradient", "11x", 5),
        ("grpo.training.trainer.accumulate_gradient", "12x", 3),
        pytest.param("grpo.training.trainer.apply_gradient", "11x", 3, marks=SLOW),
        pytest.param("grpo.training.trainer.sampling_metrics", "5x", 3, marks=SLOW),
        ("grpo.training.recorder.Recorder.step", "5x", 3),
        ("grpo.training.evaluation.score_completions", "1x", 4),
        pytest.param("grpo.training.recorder.StepDisplay.update", "5x", 5, marks=SLOW),
    ],
    ids=[
        "in a reward",
        "in the rollout",
        "at the start of a step",
        "at the start of an iteration",
        "in the reference pass",
        "in the first gradient of a step",
        "in the second gradient of a step",
        "in an update",
        "after the updates of a step",
        "before the row is written",
        "in an evaluation",
        "after the row is written",
    ],
)
def test_an_error_outside_an_update_saves_the_last_step_and_resume_is_bitwise_equal(
    tmp_path, straight, place, call, saved
):
    run_dir = tmp_path / "run"
    settings = ["checkpoint.every=3", "eval.every=4", "eval.max_problems=4"]
    failed = start(run_dir, *settings, fault=(place, call, "fails once")).wait()
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "failed: ValueError: fails once"
    assert status(run_dir)["state"] == "failed"
    assert checkpoint_steps(run_dir)[-1] == saved
    resumed = resume(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


def test_an_error_of_the_save_does_not_hide_the_error_that_ended_the_run(tmp_path):
    run_dir = tmp_path / "run"
    (tmp_path / "fails.py").write_text(FAILS_AND_BREAKS_SAVES)
    failing = "+reward.components.fails={_target_: fails.fails, isolate: false}"
    failed = launch(*SHORT, "checkpoint.overlap=true", failing, "run_dir=run", cwd=tmp_path)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("failed: RewardError: reward component 'fails' raised ValueError: why (")
    assert "could not write the checkpoint of step 3 (cannot be saved)" in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr + failed.stdout
    assert checkpoint_steps(run_dir) == []


FAILS_AND_BREAKS_SAVES = """
from grpo.runs import checkpoint_writer

calls = 0


def cannot_save(*arguments):
    raise TypeError("cannot be saved")


def fails(completions, **columns):
    global calls
    calls += 1
    checkpoint_writer.write_checkpoint = cannot_save
    if calls == 5:  # the first call is of the pre-flight
        raise ValueError("why")
    return [0.0] * len(completions)
"""


# Damaged checkpoints.


@pytest.mark.parametrize(
    "damage", ["bit-flipped", pytest.param("truncated", marks=SLOW), pytest.param("missing", marks=SLOW)]
)
def test_a_damaged_checkpoint_is_skipped_and_the_result_is_the_same(tmp_path, straight, damage):
    run_dir = tmp_path / "run"
    fault = (f"{GROUPS}.group_keys", "6", "kill")
    start(run_dir, "checkpoint.every=1", "checkpoint.keep_last=3", fault=fault).wait()
    file = run_dir / "checkpoints" / "step_000005" / "optimizer.safetensors"
    if damage == "truncated":
        os.truncate(file, 1000)
    elif damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    resumed = resume(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert "step_000005 is damaged (" in resumed.stderr + resumed.stdout
    assert "trying the one before it" in resumed.stderr + resumed.stdout
    assert_same_run(run_dir, straight)


def test_without_an_intact_checkpoint_a_resume_fails_and_nothing_is_deleted(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir, fault=(f"{GROUPS}.group_keys", "4", "kill")).wait()
    os.truncate(run_dir / "checkpoints" / "step_000002" / "model.safetensors", 10)
    before = sorted(run_dir.joinpath("checkpoints").rglob("*"))
    resumed = resume(run_dir)
    assert resumed.returncode == 2
    assert "none of the 1 checkpoints in" in resumed.stderr.splitlines()[-1]
    assert sorted(run_dir.joinpath("checkpoints").rglob("*")) == before
    assert len(rows(run_dir)) == 3


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_missing_is_not_started_again(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir, fault=(f"{GROUPS}.group_keys", "4", "kill")).wait()
    (run_dir / "checkpoints").rename(run_dir / "moved")
    refused = resume(run_dir)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(
        "has no checkpoint, but the run has saved one at step 2; restore its checkpoints, or start a new run"
    )
    assert len(rows(run_dir)) == 3
    (run_dir / "moved").rename(run_dir / "checkpoints")
    assert resume(run_dir).returncode == 0


# A disk that is full or read-only.


@pytest.fixture
def mount(tmp_path):
    """Mount a small or read-only file system at a folder; the test is skipped where that is not allowed."""
    mounted = []

    def make(folder, *options):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_full_disk_training_continues_and_the_previous_checkpoint_is_kept(tmp_path, straight, mount):
    run_dir = tmp_path / "run"
    mount(run_dir / "checkpoints", "-t", "tmpfs", "-o", "size=2500k", "tmpfs")  # room for one checkpoint, not for two
    run = start(run_dir).wait()
    assert run.returncode == 0, run.stderr
    assert "could not write the checkpoint of step 4 (it takes" in run.stderr + run.stdout
    assert "training continues, the one before it is kept" in run.stderr + run.stdout
    assert checkpoint_steps(run_dir) == [2]
    assert find_damage(run_dir / "checkpoints" / "step_000002") is None
    assert rows(run_dir) == rows(straight)


def test_training_continues_if_no_checkpoint_can_be_written(tmp_path, straight, mount):
    run_dir = tmp_path / "run"
    mount(run_dir / "checkpoints", "-t", "tmpfs", "-o", "ro", "tmpfs")
    run = start(run_dir).wait()
    assert run.returncode == 0, run.stderr
    assert "Read-only file system" in run.stderr + run.stdout
    assert rows(run_dir) == rows(straight)


@pytest.mark.slow
def test_a_run_that_cannot_write_metrics_fails_with_the_reason_and_can_be_resumed(tmp_path, straight, mount):
    run_dir = tmp_path / "run"
    mount(run_dir / "metrics", "-t", "tmpfs", "-o", "size=4k", "tmpfs")
    run = start(run_dir).wait()
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("failed: OSError: [Errno 28] No space left on device")
    assert status(run_dir)["state"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=1m", str(run_dir / "metrics")], check=True)
    resumed = resume(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


NO_FSYNC = """
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int fd) {
    struct stat found;
    if (fstat(fd, &found) == 0 && (ALSO_FILES || S_ISDIR(found.st_mode))) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_fsync, fd);
}
"""


@pytest.mark.parametrize("also_files", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_file_system_that_refuses_fsync_gives_one_warning(tmp_path, straight, also_files):
    (tmp_path / "shim.c").write_text(NO_FSYNC)
    shim = tmp_path / "shim.so"
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    flags = ["-shared", "-fPIC", f"-DALSO_FILES={also_files}", "-o", str(shim)]
    subprocess.run([compiler, *flags, str(tmp_path / "shim.c")], check=True)
    command = [sys.executable, str(ROOT / "launch.py"), *SETTINGS, "run_dir=run"]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (run.stdout + run.stderr).count("fsync does not work in this folder (Invalid argument)") == 1
    assert_same_run(tmp_path / "run", straight)


FULL = """
import os
import signal
from pathlib import Path

calls = 0


def fill_disk(completions, then, **columns):
    global calls
    calls += 1
    if calls == 3:
        with Path("run/filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1000))
            except OSError:
                pass
        if then == "raise":
            raise ValueError("the real reason")
        os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)


def block_status(completions, **columns):
    global calls
    calls += 1
    if calls == 1:
        Path("run/status.json").rename("run/status.json.kept")
        Path("run/status.json").mkdir()
    if calls == 3:
        Path("run/status.json").rmdir()
        Path("run/status.json.kept").rename("run/status.json")
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize(("then", "code"), [("raise", 1), ("stop", 143)])
def test_a_full_disk_does_not_hide_why_the_run_ended(tmp_path, mount, then, code):
    (tmp_path / "full.py").write_text(FULL)
    mount(tmp_path / "run", "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    filling = f"+reward.components.fill={{_target_: full.fill_disk, isolate: false, then: {then}}}"
    ended = launch(*SHORT, "run_dir=run", "resume=auto", "checkpoint.every=0", filling, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr[-3000:] + ended.stdout[-2000:]
    if then == "raise":
        raised = f"raised ValueError: the real reason ({tmp_path}/full.py, line 20)"
        last = f"failed: RewardError: reward component 'fill' {raised}"
        assert ended.stderr.splitlines()[-1] == last
    assert "run/status.json could not be written: [Errno 28] No space left" in ended.stderr + ended.stdout


def test_a_status_that_cannot_be_written_does_not_end_training(tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    blocking = "+reward.components.block={_target_: full.block_status}"
    run = launch(*SHORT, "run_dir=run", "grpo.num_steps=3", "preflight=false", blocking, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (run.stderr + run.stdout).count("run/status.json could not be written") >= 2
    assert len(rows(tmp_path / "run")) == 3
    assert status(tmp_path / "run")["state"] == "finished"


# Signals.


@pytest.mark.parametrize(
    ("place", "call", "name", "code"),
    [
        ("grpo.rollout.native.sample_tokens", "60", "term", 143),
        pytest.param("grpo.training.update.completion_logps", "8", "int", 130, marks=SLOW),
        pytest.param("torch.Tensor.backward", "5", "term", 143, marks=SLOW),
        ("torch.Tensor.backward", "6", "usr1", 138),
        ("grpo.training.groups.score_completions", "6", "hup", 129),
        pytest.param("grpo.runs.checkpoint_writer.write_checkpoint", "1", "int", 130, marks=SLOW),
    ],
    ids=["in sampling", "in the reference pass", "in backward", "in the second update", "in scoring", "in a save"],
)
def test_a_signal_saves_the_step_and_resume_is_bitwise_equal(tmp_path, straight, place, call, name, code):
    run_dir = tmp_path / "run"
    stopped = start(run_dir, fault=(place, f"{call}x", name)).wait()
    assert stopped.returncode == code
    assert f"resume with: python {ROOT / 'launch.py'} resume=true run_dir={run_dir}" in stopped.stdout
    assert status(run_dir)["state"] == "interrupted"
    step = status(run_dir)["step"]
    assert 2 <= step < STEPS
    assert [row["step"] for row in rows(run_dir)] == list(range(1, step + 1))
    assert load_state(latest_checkpoint(run_dir / "checkpoints")).step == step  # of a completed step
    resumed = resume(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


def test_a_closed_terminal_that_sends_sighup_twice_does_not_prevent_the_save(tmp_path):
    run_dir = tmp_path / "run"
    fault = ("grpo.runs.checkpoint_writer.write_checkpoint", "1x", "sleep:2")
    process = start(run_dir, "checkpoint.every=3", "resume=auto", fault=fault)
    wait_for_step(run_dir, 3)
    for _ in range(3):
        time.sleep(0.3)
        process.send_signal(signal.SIGHUP)
    assert process.wait().returncode == 129
    assert checkpoint_steps(run_dir) == [3]


@pytest.mark.slow
def test_under_nohup_sighup_does_not_stop_a_run(tmp_path, straight):
    run_dir = tmp_path / "run"
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the processes of this test inherit it
    try:
        command = [sys.executable, "-m", "tests.inject", "grpo.training.groups.group_keys", "3x", "hup"]
        command += [*SETTINGS, f"run_dir={run_dir}"]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    finally:
        signal.signal(signal.SIGHUP, former)
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_a_signal_drops_a_step_that_would_take_long(tmp_path, straight):
    # During the first step it is not known how long a step takes, so it counts as long.
    run_dir = tmp_path / "run"
    stopped = start(run_dir, fault=("grpo.rollout.native.sample_tokens", "5x", "term")).wait()
    assert stopped.returncode == 143
    assert rows(run_dir) == []
    assert checkpoint_steps(run_dir) == []
    start(run_dir, "resume=true", fault=(f"{GROUPS}.group_keys", "4x", "term")).wait()
    assert checkpoint_steps(run_dir) == [4]
    again = resume(run_dir, fault=("torch.Tensor.backward", "1x", "term"))
    assert again.returncode == 143
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]
    assert resume(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


def test_a_step_that_has_changed_the_policy_is_completed_before_it_is_saved(tmp_path, straight):
    run_dir = tmp_path / "run"
    # The second gradient of the first step: the policy has changed once, so the step is completed before it is saved.
    stopped = start(run_dir, fault=(f"{TRAINER}.accumulate_gradient", "2x", "term")).wait()
    assert stopped.returncode == 143
    assert [row["step"] for row in rows(run_dir)] == [1]
    assert checkpoint_steps(run_dir) == [1]
    assert resume(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


def test_a_checkpoint_written_during_the_last_step_is_recorded_as_saved(tmp_path):
    run_dir = tmp_path / "run"
    assert start(run_dir, "grpo.num_iterations=1", "checkpoint.overlap=true").wait().returncode == 0
    assert (status(run_dir)["saved_step"], checkpoint_steps(run_dir)[-1]) == (4, 4)
    shutil.rmtree(run_dir / "checkpoints")
    refused = resume(run_dir, "grpo.num_steps=5")
    assert refused.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_stop_signal_waits_for_the_checkpoint_that_is_written_during_training(tmp_path, straight, signals):
    run_dir = tmp_path / "run"
    fault = ("grpo.runs.checkpoint_writer.write_checkpoint", "1x", "sleep:3")
    process = start(run_dir, "checkpoint.overlap=true", "checkpoint.every=3", "resume=auto", fault=fault)
    wait_for_step(run_dir, 3)
    for _ in range(signals):
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    assert process.wait().returncode == 143
    assert 3 in checkpoint_steps(run_dir) or checkpoint_steps(run_dir)[-1] > 3
    assert find_damage(latest_checkpoint(run_dir / "checkpoints")) is None
    assert resume(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


def test_a_signal_after_training_has_finished_changes_nothing(tmp_path, straight):
    run_dir = tmp_path / "run"
    done = start(run_dir, "resume=auto", fault=("grpo.analysis.charts.write_summary", "1x", "term")).wait()
    assert done.returncode == 0, done.stderr
    assert (run_dir / "summary.json").exists()
    assert_same_run(run_dir, straight)


def test_the_previous_signal_handlers_are_restored_when_a_run_ends():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopSignals()
    with stop.installed():
        assert all(signal.getsignal(number) != before[number] for number in STOP_SIGNALS)
        stop.ignore_signals()
        os.kill(os.getpid(), signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    with pytest.raises(SystemExit) as left, stop.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert left.value.code == 138
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_a_step_can_be_aborted_if_much_time_is_left_or_it_takes_longer_than_the_last_step(monkeypatch):
    trainer = object.__new__(Trainer)
    trainer._step_started = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: 50.0)
    for last_step_took, dropped in ((55.0, False), (59.0, False), (70.0, True), (40.0, True), (math.inf, True)):
        trainer._step_seconds = last_step_took
        trainer._step_can_abort = True
        assert trainer.should_abort_step() is dropped
        trainer._step_can_abort = False
        assert trainer.should_abort_step() is False


@pytest.mark.slow
def test_files_left_by_killed_launches_do_not_block_a_new_one(tmp_path, straight):
    run_dir = tmp_path / "run"
    (run_dir / ".hydra").mkdir(parents=True)
    (run_dir / ".hydra" / "overrides.yaml").write_text("[]\n")
    (run_dir / ".lock").write_text('{"machine": "m", "pid": 1, "token": "t"}')
    run = start(run_dir, "resume=auto").wait()
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in (run_dir / ".hydra").iterdir()) == [
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    ]
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_an_interrupted_evaluation_is_repeated(tmp_path):
    settings = [*SHORT, "eval.every=2", "grpo.num_steps=4", "eval.max_problems=4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert launch(*settings, f"run_dir={whole}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.evaluation.score_completions", "2x", "term")
    assert launch(*settings, f"run_dir={stopped}", cwd=tmp_path, fault=fault).returncode == 143
    assert sorted(path.name for path in (stopped / "eval").iterdir()) == ["step_000002.json"]
    assert checkpoint_steps(stopped) == [4]
    assert resume(stopped).returncode == 0
    for name in ("step_000002.json", "step_000004.json"):
        assert (stopped / "eval" / name).read_text() == (whole / "eval" / name).read_text()
    state = "checkpoints/best/trainer_state.json"
    assert (stopped / state).read_text() == (whole / state).read_text()


def test_repeating_the_same_command_with_resume_auto_finishes_the_run(tmp_path, straight):
    run_dir = tmp_path / "run"
    codes = []
    for call in ("2x", "2x", "2x", "99x"):
        fault = (f"{GROUPS}.group_keys", call, "usr1")
        codes.append(start(run_dir, "resume=auto", fault=fault).wait().returncode)
    assert codes == [138, 138, 138, 0]
    again = start(run_dir, "resume=auto").wait()
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("grpo.analysis.charts.png", "no report (ValueError: cannot draw); try again: python -m grpo report run_dir="),
        pytest.param("grpo.runs.tracking.Tracker.set_summary", "", marks=SLOW),
        pytest.param("grpo.analysis.run_report.render", "no report (ValueError: cannot draw)", marks=SLOW),
    ],
)
def test_a_finished_run_exits_with_0_although_its_report_fails_which_can_be_written_later(tmp_path, place, said):
    run_dir = tmp_path / "run"
    fault = (place, "1", "cannot draw")
    done = launch(*SHORT, "grpo.num_steps=2", f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr
    assert status(run_dir)["state"] == "finished"
    assert not list(run_dir.rglob("*.tmp"))
    assert grpo("report", f"run_dir={run_dir}", cwd=tmp_path).returncode == 0
    assert (run_dir / "report.html").read_text(encoding="utf-8").endswith("</html>")
