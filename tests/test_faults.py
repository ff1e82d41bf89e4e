"""Faults that a run survives, each in a real process; tests/inject.py describes how they are caused."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.checks import typed
from grpo.config.migrations import load_frozen
from grpo.runs.checkpoint import find_damage, latest_checkpoint, load_state, read_checkpoint
from grpo.runs.stop_signals import STOP_SIGNALS, StopSignals
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_experiment
from grpo.training.trainer import Trainer
from tests.launches import NO_FAULT, SETTINGS, STEPS, assert_same_run, grpo, launch, rows, start, status, wait_for_step

QUICK = [*SETTINGS, "grpo.num_iterations=1", "grpo.mu=1"]
TRAINER = "grpo.training.trainer"
RECORDER = "grpo.training.recorder.Recorder"


def go_on(run_dir, *arguments, **options):
    return launch("resume=true", f"run_dir={run_dir}", *arguments, cwd=run_dir.parent, **options)


def checkpoint_steps(run_dir):
    return [int(path.name[-6:]) for path in sorted((run_dir / "checkpoints").glob("step_*"))]


SLOW = pytest.mark.slow  # rows of large tables, of which a plain test run takes only a sample

# Killed at any moment.


@pytest.mark.parametrize(
    ("place", "call", "arguments"),
    [
        pytest.param(f"{TRAINER}.group_keys", "1", [], id="before the first step"),
        pytest.param(f"{RECORDER}.step", "1", [], id="before the first step is written down", marks=SLOW),
        pytest.param(f"{TRAINER}.apply_gradient", "6", [], id="between the updates of a batch"),
        pytest.param(f"{TRAINER}.group_keys", "7", ["checkpoint.every=3"], id="at the end of an epoch"),
        pytest.param(f"{TRAINER}.group_keys", "6", ["checkpoint.every=5"], id="in the middle of an epoch", marks=SLOW),
        pytest.param(f"{TRAINER}.group_keys", "5", [], id="at the end of an iteration", marks=SLOW),
        pytest.param(f"{TRAINER}.group_keys", "8", ["checkpoint.every=7"], id="before the last step", marks=SLOW),
        pytest.param("grpo.runs.folder.RunFolder.save_final_model", "1", [], id="after the last step"),
        pytest.param("grpo.analysis.charts.write_summary", "1", [], id="while the charts are drawn", marks=SLOW),
    ],
)
def test_a_run_killed_at_a_given_place_and_resumed_is_bitwise_equal(tmp_path, straight, place, call, arguments):
    run_dir = tmp_path / "run"
    killed = start(run_dir, *arguments, fault=(place, call, "kill")).wait()
    assert killed.returncode == -9
    if place != "grpo.analysis.charts.write_summary":
        resumed = go_on(run_dir)
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


# Damaged checkpoints.


@pytest.mark.parametrize(
    "damage", ["bit-flipped", pytest.param("truncated", marks=SLOW), pytest.param("missing", marks=SLOW)]
)
def test_a_damaged_checkpoint_is_skipped_and_the_result_is_the_same(tmp_path, straight, damage):
    run_dir = tmp_path / "run"
    fault = (f"{TRAINER}.group_keys", "6", "kill")
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
    resumed = go_on(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert "step_000005 is damaged (" in resumed.stderr + resumed.stdout
    assert "trying the one before it" in resumed.stderr + resumed.stdout
    assert_same_run(run_dir, straight)


def test_without_an_intact_checkpoint_a_resume_fails_and_nothing_is_deleted(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir, fault=(f"{TRAINER}.group_keys", "4", "kill")).wait()
    os.truncate(run_dir / "checkpoints" / "step_000002" / "model.safetensors", 10)
    before = sorted(run_dir.joinpath("checkpoints").rglob("*"))
    resumed = go_on(run_dir)
    assert resumed.returncode == 1
    assert "none of the 1 checkpoints in" in resumed.stderr.splitlines()[-1]
    assert sorted(run_dir.joinpath("checkpoints").rglob("*")) == before
    assert len(rows(run_dir)) == 3


def test_a_run_whose_checkpoints_are_missing_is_not_started_again(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir, fault=(f"{TRAINER}.group_keys", "4", "kill")).wait()
    (run_dir / "checkpoints").rename(run_dir / "moved")
    refused = go_on(run_dir)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].endswith(
        "has no checkpoint, but the run has saved one at step 2; bring its checkpoints back, or start a new run"
    )
    assert len(rows(run_dir)) == 3
    (run_dir / "moved").rename(run_dir / "checkpoints")
    assert go_on(run_dir).returncode == 0


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


def test_a_run_that_cannot_write_metrics_fails_with_the_reason_and_can_be_resumed(tmp_path, straight, mount):
    run_dir = tmp_path / "run"
    mount(run_dir / "metrics", "-t", "tmpfs", "-o", "size=4k", "tmpfs")
    run = start(run_dir).wait()
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("failed: OSError: [Errno 28] No space left on device")
    assert status(run_dir)["state"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=1m", str(run_dir / "metrics")], check=True)
    resumed = go_on(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


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
    filling = f"+reward.components.fill={{_target_: full.fill_disk, then: {then}}}"
    ended = launch(*QUICK, "run_dir=run", "resume=auto", "checkpoint.every=0", filling, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr[-3000:] + ended.stdout[-2000:]
    if then == "raise":
        last = "failed: RewardError: reward component 'fill' raised ValueError: the real reason"
        assert ended.stderr.splitlines()[-1] == last
    assert "run/status.json could not be written: [Errno 28] No space left" in ended.stderr + ended.stdout


def test_a_status_that_cannot_be_written_does_not_end_training(tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    blocking = "+reward.components.block={_target_: full.block_status}"
    run = launch(*QUICK, "run_dir=run", "grpo.num_steps=3", "preflight=false", blocking, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (run.stderr + run.stdout).count("run/status.json could not be written") >= 2
    assert len(rows(tmp_path / "run")) == 3
    assert status(tmp_path / "run")["state"] == "finished"


# Signals.


@pytest.mark.parametrize(
    ("place", "call", "name", "code"),
    [
        ("grpo.rollout.native._sample_tokens", "60", "term", 143),
        pytest.param("grpo.training.update.completion_logps", "8", "int", 130, marks=SLOW),
        pytest.param("torch.Tensor.backward", "5", "term", 143, marks=SLOW),
        ("torch.Tensor.backward", "6", "usr1", 138),
        pytest.param("grpo.runs.checkpoint_writer.write_checkpoint", "1", "int", 130, marks=SLOW),
    ],
    ids=["in sampling", "in the reference pass", "in backward", "in the second update", "in a save"],
)
def test_a_signal_saves_the_step_and_resume_is_bitwise_equal(tmp_path, straight, place, call, name, code):
    run_dir = tmp_path / "run"
    stopped = start(run_dir, fault=(place, f"{call}x", name)).wait()
    assert stopped.returncode == code
    assert f"resume with: python launch.py resume=true run_dir={run_dir.relative_to(tmp_path)}" in stopped.stdout
    assert status(run_dir)["state"] == "interrupted"
    step = status(run_dir)["step"]
    assert 2 <= step < STEPS
    assert [row["step"] for row in rows(run_dir)] == list(range(1, step + 1))
    assert load_state(latest_checkpoint(run_dir / "checkpoints")).step == step  # of a completed step
    resumed = go_on(run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, straight)


@pytest.mark.slow
def test_a_signal_drops_a_step_that_would_take_long(tmp_path, straight):
    # During the first step it is not known how long a step takes, so it counts as long.
    run_dir = tmp_path / "run"
    stopped = start(run_dir, fault=("grpo.rollout.native._sample_tokens", "5x", "term")).wait()
    assert stopped.returncode == 143
    assert rows(run_dir) == []
    assert checkpoint_steps(run_dir) == []
    start(run_dir, "resume=true", fault=(f"{TRAINER}.group_keys", "4x", "term")).wait()
    assert checkpoint_steps(run_dir) == [4]
    again = go_on(run_dir, fault=("torch.Tensor.backward", "1x", "term"))
    assert again.returncode == 143
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3, 4]
    assert go_on(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


def test_a_step_that_has_changed_the_policy_is_completed_before_it_is_saved(tmp_path, straight):
    run_dir = tmp_path / "run"
    # The second gradient of the first step: the policy has changed once, so the step is completed before it is saved.
    stopped = start(run_dir, fault=(f"{TRAINER}.accumulate_gradient", "2x", "term")).wait()
    assert stopped.returncode == 143
    assert [row["step"] for row in rows(run_dir)] == [1]
    assert checkpoint_steps(run_dir) == [1]
    assert go_on(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


@pytest.mark.parametrize("signals", [pytest.param(1, marks=SLOW), 2])
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
    assert go_on(run_dir).returncode == 0
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
        assert trainer.can_abort_step() is dropped
        trainer._step_can_abort = False
        assert trainer.can_abort_step() is False


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


def test_an_interrupted_evaluation_is_repeated(tmp_path):
    settings = [*QUICK, "eval.every=2", "grpo.num_steps=4", "eval.max_problems=4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert launch(*settings, f"run_dir={whole}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.evaluation.score_completions", "2x", "term")
    assert launch(*settings, f"run_dir={stopped}", cwd=tmp_path, fault=fault).returncode == 143
    assert sorted(path.name for path in (stopped / "eval").iterdir()) == ["step_000002.json"]
    assert checkpoint_steps(stopped) == [4]
    assert go_on(stopped).returncode == 0
    for name in ("step_000002.json", "step_000004.json"):
        assert (stopped / "eval" / name).read_text() == (whole / "eval" / name).read_text()
    state = "checkpoints/best/trainer_state.json"
    assert (stopped / state).read_text() == (whole / state).read_text()


def test_repeating_the_same_command_with_resume_auto_finishes_the_run(tmp_path, straight):
    run_dir = tmp_path / "run"
    codes = []
    for call in ("2x", "2x", "2x", "99x"):
        fault = (f"{TRAINER}.group_keys", call, "usr1")
        codes.append(start(run_dir, "resume=auto", fault=fault).wait().returncode)
    assert codes == [138, 138, 138, 0]
    again = start(run_dir, "resume=auto").wait()
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    assert_same_run(run_dir, straight)


# Out of memory.


CUT = ["hardware.rollout_tokens=400", "hardware.micro_batch_tokens=200", "grpo.num_steps=3", "checkpoint.every=1"]
CUT += ["checkpoint.keep_last=2", "preflight=false"]  # a budget halved in the pre-flight is restored after it


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run with enough memory. Tests only read it."""
    run_dir = tmp_path_factory.mktemp("cut") / "run"
    assert launch(*QUICK, *CUT, f"run_dir={run_dir}", cwd=run_dir.parent).returncode == 0
    return run_dir


@pytest.mark.parametrize(
    ("place", "call", "part"),
    [
        ("grpo.rollout.native._decode", "1x", "rollout"),
        pytest.param(f"{TRAINER}.all_logps", "1x", "reference", marks=SLOW),
        pytest.param(f"{TRAINER}.accumulate_gradient", "1x", "update", marks=SLOW),
        ("torch.Tensor.backward", "2x", "update"),
    ],
    ids=["in sampling", "in the reference pass", "in forward", "in backward"],
)
def test_out_of_memory_halves_the_token_budget_and_a_resumed_run_keeps_it(tmp_path, cut_run, place, call, part):
    budget = 400 if part == "rollout" else 200
    run_dir = tmp_path / "run"
    failing = launch(*QUICK, *CUT, f"run_dir={run_dir}", cwd=tmp_path, fault=(place, call, "memory"))
    assert failing.returncode == 0, failing.stderr
    said = failing.stderr + failing.stdout
    assert f"out of memory in the {part} with {budget} tokens at a time; trying {budget // 2} from here on" in said
    assert said.count("out of memory") == 1
    assert load_state(run_dir / "checkpoints" / "step_000003").parts == {part: {"from": budget, "to": budget // 2}}
    # Batches are split differently; problems and noise are the same, and the numbers are equal up to rounding.
    for ours, theirs in zip(rows(run_dir), rows(cut_run), strict=True):
        assert ours["digest/completions"] == theirs["digest/completions"]
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7)
    weights, uncut = (load_file(folder / "final_model" / "model.safetensors") for folder in (run_dir, cut_run))
    for name in weights:
        torch.testing.assert_close(weights[name], uncut[name], rtol=1e-4, atol=1e-6)

    more = ["resume=true", f"run_dir={run_dir}", "grpo.lr_schedule=linear", "grpo.num_steps=3"]
    (run_dir / "status.json").write_text(json.dumps(status(run_dir) | {"state": "interrupted"}))
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    never_again = ("grpo.model.oom.TokenBudget._halve", "1", "kill")
    assert part_tokens(run_dir, part) == budget // 2
    assert launch(*more, cwd=tmp_path, fault=never_again).returncode == 0
    assert load_state(run_dir / "checkpoints" / "step_000003").parts == {part: {"from": budget, "to": budget // 2}}


def test_out_of_memory_while_a_gradient_is_added_to_its_master_weight_adds_nothing_twice(tmp_path):
    """In bfloat16 each gradient is converted to float32, for which there may be no memory. The optimizer is SGD."""
    settings = [*QUICK, "grpo.num_steps=1", "hardware.compute_dtype=bfloat16", "optimizer.lr=1.0", "checkpoint.every=0"]
    settings += ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.fused", "grpo.warmup_steps=0"]
    weights = [load_file(MODEL_DIR / "model.safetensors")]
    for name, fault in (
        ("straight", NO_FAULT),
        ("failing", ("grpo.model.loading._pass_gradient_to_master", "7x", "memory")),
    ):
        run_dir = tmp_path / name
        done = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
        assert done.returncode == 0, done.stderr
        assert ("out of memory in the update" in done.stderr + done.stdout) == (name == "failing")
        weights.append(load_file(run_dir / "final_model" / "model.safetensors"))
    for name, before in weights[0].items():
        straight, failing = weights[1][name] - before, weights[2][name] - before
        assert straight.norm() > 0
        assert (failing - straight).norm() < 0.2 * straight.norm(), name  # split differently, so rounded differently


def part_tokens(run_dir, part):
    """How many tokens a run that is resumed from its newest checkpoint processes at once in this part."""
    trainer = Trainer(build_experiment(typed(load_frozen(run_dir / "config.yaml"))))
    trainer.load_state_dict(read_checkpoint(latest_checkpoint(run_dir / "checkpoints")))
    return trainer.state_dict()["trainer"].parts[part]["to"]


def test_out_of_memory_with_one_completion_says_what_to_lower(tmp_path):
    fault = (f"{TRAINER}.accumulate_gradient", "1", "memory")
    failed = launch(*QUICK, "hardware.micro_batch_tokens=150", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, fault=fault)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert "out of memory in the update with one completion at a time; lower grpo.max_completion_length" in last
    assert "with 150 tokens at a time; trying 75" in failed.stderr + failed.stdout


# NaN.


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_its_batch_is_saved(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*QUICK, "grpo.num_steps=4", "checkpoint.every=1", "checkpoint.keep_last=9"]
    fault = ("grpo.algorithm.objective.Objective.__call__", "2x", "nan")
    run = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
    assert run.returncode == 0, run.stderr
    assert [row["loss"] is None for row in rows(run_dir)] == [False, True, False, False]
    assert "NaN" not in (run_dir / "metrics" / "metrics.jsonl").read_text()
    for name in ("model", "optimizer"):
        one, two, three = (
            (run_dir / "checkpoints" / f"step_00000{step}" / f"{name}.safetensors").read_bytes() for step in (1, 2, 3)
        )
        assert one == two != three
    batch = load_file(run_dir / "skipped" / "step_000002.safetensors")
    assert batch["completion_ids"].shape == (12, batch["completion_mask"].shape[1])
    samples = (run_dir / "skipped" / "step_000002.jsonl").read_text().splitlines()
    assert [json.loads(line)["advantage"] for line in samples] == pytest.approx(batch["advantages"].tolist())
    states = [load_state(run_dir / "checkpoints" / f"step_00000{step}").skipped_in_a_row for step in (1, 2, 3)]
    assert states == [0, 1, 0]


def test_after_too_many_skipped_steps_in_a_row_the_run_fails_with_an_intact_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*QUICK, "grpo.num_steps=6", "checkpoint.every=1", "grpo.max_skipped_steps=2"]
    fault = ("grpo.algorithm.objective.Objective.__call__", "3", "nan")
    run = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
    assert run.returncode == 1
    assert "loss or gradient was not finite in 3 steps in a row" in run.stderr.splitlines()[-1]
    assert status(run_dir)["state"] == "failed"
    kept = sorted(path.stem for path in (run_dir / "skipped").glob("*.jsonl"))
    assert kept == ["step_000003", "step_000004", "step_000005"]
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert load_state(checkpoint).step == 4
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


# Two processes.


def test_a_second_process_on_a_run_folder_is_refused(tmp_path, straight):
    run_dir = tmp_path / "run"
    first = start(run_dir, fault=(f"{TRAINER}.group_keys", "2x", "sleep:60"))
    wait_for_step(run_dir, 1)
    second = go_on(run_dir)
    assert second.returncode == 2
    assert f"{run_dir.name} is in use by another process" in second.stderr
    first.kill()
    first.wait()
    assert go_on(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


# Sweeps.

REWARDS = """
import gc
import hashlib
from pathlib import Path

from transformers import Qwen2ForCausalLM


def count_models(completions, **columns):
    alive = sum(isinstance(each, Qwen2ForCausalLM) for each in gc.get_objects())
    with open("models", "a") as file:
        file.write(f"{alive}\\n")
    return [0.0] * len(completions)


def fail_without_a_file(completions, **columns):
    if Path("fail").exists() and Path("fail").read_text() == str(sum(1 for _ in Path("sweep").glob("*/config.yaml"))):
        raise ValueError("as asked")
    return [0.0] * len(completions)


def leave(completions, how, **columns):
    raise {"exit": SystemExit(0), "interrupt": KeyboardInterrupt()}[how]


def hang(completions, **columns):
    while True:
        pass


def hang_in_c(completions, **columns):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.fixture
def my_rewards(tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_leaves_no_model_in_memory_and_is_run_again_on_resume(my_rewards):
    sweep = my_rewards / "sweep"
    command = [
        "-m",
        *QUICK,
        "hydra/launcher=basic",  # all jobs in one process
        "grpo.num_steps=2",
        "grpo.beta=0.01,0.02,0.04",
        "tracking=offline",
        "sweep_dir=sweep",
        "+reward.components.count={_target_: my_rewards.count_models, weight: 0}",
        "+reward.components.fail={_target_: my_rewards.fail_without_a_file, weight: 0}",
    ]
    (my_rewards / "fail").write_text("2")  # the second job
    failed = launch(*command, cwd=my_rewards)
    assert failed.returncode == 1
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [status(job)["state"] for job in jobs] == ["finished", "failed", "finished"]
    assert "Traceback" not in failed.stdout + failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("failed: ")
    assert f"sweep/{jobs[1].name} failed: {status(jobs[1])['error']}" in failed.stdout + failed.stderr
    assert "Traceback" in (jobs[1] / "launch.log").read_text()
    alive = [int(line) for line in (my_rewards / "models").read_text().split()]
    assert set(alive) == {2}  # only its own policy and reference, also in the job after the failed one
    wandb_runs = [path for job in jobs for path in job.glob("wandb/offline-run-*")]
    assert len({path.name.rsplit("-", 1)[-1] for path in wandb_runs}) == len(jobs)
    finished = {job: (job / "metrics" / "metrics.jsonl").stat().st_mtime_ns for job in (jobs[0], jobs[2])}

    (my_rewards / "fail").unlink()
    again = launch(*command, "resume=true", cwd=my_rewards)
    assert again.returncode == 0, again.stderr
    assert [status(job)["state"] for job in jobs] == ["finished"] * 3
    assert sorted(path for path in sweep.iterdir() if path.is_dir()) == jobs
    assert {job: (job / "metrics" / "metrics.jsonl").stat().st_mtime_ns for job in finished} == finished
    assert [row["step"] for row in rows(jobs[1])] == [1, 2]


def test_a_killed_sweep_resumes_where_it_stopped(tmp_path):
    command = ["-m", *QUICK, "hydra/launcher=basic", "grpo.num_steps=3", "grpo.beta=0.01,0.04", "checkpoint.every=1"]
    assert launch(*command, "sweep_dir=whole", cwd=tmp_path).returncode == 0
    fault = (f"{TRAINER}.group_keys", "5", "kill")  # the second step of the second job
    assert launch(*command, "sweep_dir=sweep", cwd=tmp_path, fault=fault).returncode == -9
    again = launch(*command, "sweep_dir=sweep", "resume=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for job in (tmp_path / "whole").glob("[01]_*"):
        twin = tmp_path / "sweep" / job.name
        assert rows(twin) == rows(job)
        assert (twin / "final_model" / "model.safetensors").read_bytes() == (
            job / "final_model" / "model.safetensors"
        ).read_bytes()


def test_a_sweep_that_does_not_exist_cannot_be_resumed(tmp_path):
    refused = launch("-m", *QUICK, "grpo.beta=0.01,0.04", "resume=true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "resume=true: no sweep with these overrides was found; give those of its first launch" in refused.stderr


# Reward functions that raise SystemExit or KeyboardInterrupt.


@pytest.mark.parametrize(("how", "raised"), [("exit", "SystemExit(0)"), ("interrupt", "KeyboardInterrupt()")])
def test_an_exit_without_a_signal_counts_as_a_failure(my_rewards, how, raised):
    leaving = f"+reward.components.leave={{_target_: my_rewards.leave, how: {how}}}"
    failed = launch(*QUICK, "run_dir=run", leaving, cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"failed: RuntimeError: {raised} was raised by code of the run")
    assert status(my_rewards / "run")["state"] == "failed"
    assert "my_rewards.py" in (my_rewards / "run" / "launch.log").read_text()
    assert not (my_rewards / "run" / "checkpoints").exists()


def test_an_exit_in_a_command_counts_as_a_failure(my_rewards):
    leaving = "+reward.components.leave={_target_: my_rewards.leave, how: exit}"
    failed = grpo("evaluate", "experiment=quickstart", "eval.max_problems=2", leaving, cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("failed: RuntimeError: SystemExit(0) was raised")


# Reward functions that hang.


def test_a_reward_function_that_hangs_fails_the_run_after_its_timeout_or_is_skipped(my_rewards):
    settings = [*QUICK, "grpo.num_steps=1", "reward.timeout_s=0.5"]
    settings += ["+reward.components.hang={_target_: my_rewards.hang}"]
    failed = launch(*settings, "run_dir=a", cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "failed: RewardError: reward component 'hang' took longer than 0.5 s"
    skipped = launch(*settings, "run_dir=b", "reward.on_error=skip", cwd=my_rewards)
    assert skipped.returncode == 0, skipped.stderr
    said = skipped.stderr + skipped.stdout
    assert "reward component 'hang' took longer than 0.5 s; skipped for 12 completions" in said
    (row,) = rows(my_rewards / "b")
    assert row["rewards/hang/mean"] is None
    assert row["reward"] > 0


def test_a_reward_function_that_cannot_be_interrupted_ends_the_run_as_failed(my_rewards):
    hanging = "+reward.components.hang={_target_: my_rewards.hang_in_c}"
    failed = launch(*QUICK, "reward.timeout_s=0.5", "run_dir=run", hanging, cwd=my_rewards)
    assert failed.returncode == 1
    error = "RewardError: reward component 'hang' took longer than 0.5 s, and could not be ended"
    assert failed.stderr.splitlines()[-1] == f"failed: {error}"
    assert status(my_rewards / "run") == {**status(my_rewards / "run"), "state": "failed", "error": error}


# Memory.


@pytest.mark.slow
def test_resuming_needs_no_more_memory_than_training_did(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from grpo.tiny import MODEL_DIR

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config)  # 30 million parameters: copies of them outweigh the other memory of a step
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [*QUICK, f"model.name={tmp_path / 'model'}", "grpo.batch_size=2", "grpo.num_generations=2"]
    settings += ["grpo.max_completion_length=8", "grpo.num_steps=3", "checkpoint.every=2"]
    run_dir = tmp_path / "run"
    assert launch(*settings, f"run_dir={run_dir}", cwd=tmp_path).returncode == 0
    stopped = tmp_path / "stopped"
    fault = (f"{TRAINER}.group_keys", "3", "kill")
    assert launch(*settings, f"run_dir={stopped}", cwd=tmp_path, fault=fault).returncode == -9
    assert go_on(stopped).returncode == 0
    assert peaks(stopped)[2] < 1.02 * peaks(run_dir)[2]


def peaks(run_dir):
    lines = (run_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["perf/peak_memory_gb"] for line in lines]
