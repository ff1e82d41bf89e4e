"""A run that is stopped and resumed gives the same bytes as a run that is never stopped."""

import os
import signal

import pytest

from grpo.config.errors import ConfigError
from grpo.runs.checkpoint import StoredTensors
from grpo.training.train import check_until
from tests.launches import ROOT, SETTINGS, SHORT, assert_same_run, launch, resume, rows, start, status, wait_for_step


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="before the first checkpoint", marks=pytest.mark.slow),
        pytest.param(4, id="at the boundary of the iterations"),
        pytest.param(7, id="in the second iteration", marks=pytest.mark.slow),
    ],
)
def test_resume_after_kill_is_bitwise_equal(tmp_path, straight, step):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, step)
    process.kill()
    process.wait()
    result = launch("resume=true", f"run_dir={run_dir}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, straight)


def kill_after_step(run_dir, step):
    process = start(run_dir)
    wait_for_step(run_dir, step)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_resume_in_bfloat16_over_float32_weights_is_bitwise_equal(tmp_path):
    """With two updates per step, a second iteration with its own reference, and activation checkpointing."""
    settings = [*SETTINGS, "hardware.compute_dtype=bfloat16", "hardware.activation_checkpointing=true"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(*settings, f"run_dir={straight}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.trainer.refresh", "12", "kill")  # two per step, one for a new reference: in step 6
    assert launch(*settings, f"run_dir={killed}", cwd=tmp_path, fault=fault).returncode != 0
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    result = launch("resume=true", f"run_dir={killed}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(killed, straight)
    assert all(0 < row["sampling/logp_difference/mean"] < 0.1 for row in rows(straight))


@pytest.mark.slow
def test_resume_with_lora_is_bitwise_equal(tmp_path):
    """With a second iteration, whose reference is a frozen copy of the adapter. Only the adapter is saved."""
    settings = [*SETTINGS, "tuning=lora", "optimizer.lr=2e-3", "grpo.beta=0.1", "hardware.compute_dtype=bfloat16"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(*settings, f"run_dir={straight}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.trainer.apply_gradient", "12", "kill")  # two calls per step: in step 6
    assert launch(*settings, f"run_dir={killed}", cwd=tmp_path, fault=fault).returncode != 0
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4, 5]
    names = set(StoredTensors(killed / "checkpoints" / "step_000004" / "model.safetensors"))
    assert names
    assert all("lora_" in name for name in names)
    result = launch("resume=true", f"run_dir={killed}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(killed, straight)
    kl = [row["kl"] for row in rows(straight)]
    assert kl[3] > kl[4] < kl[7]  # the reference is updated before step 5


@pytest.mark.parametrize(
    "optimizer",
    [
        "tuning=full_bf16",
        pytest.param("optimizer=adamw_8bit", marks=pytest.mark.slow),
        pytest.param("optimizer=muon", marks=pytest.mark.slow),
    ],
)
def test_resume_with_any_optimizer_is_bitwise_equal(tmp_path, optimizer):
    settings = [*SETTINGS, optimizer]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(*settings, f"run_dir={straight}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.trainer.apply_gradient", "10", "kill")  # two calls per step: in step 5
    assert launch(*settings, f"run_dir={killed}", cwd=tmp_path, fault=fault).returncode != 0
    assert [row["step"] for row in rows(killed)] == [1, 2, 3, 4]
    result = launch("resume=true", f"run_dir={killed}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(killed, straight)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_the_step_in_progress_and_resume_is_bitwise_equal(tmp_path, straight, number, code):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 2)
    process.send_signal(number)
    stopped = process.wait()
    assert stopped.returncode == code
    assert f"resume with: python {ROOT / 'launch.py'} resume=true run_dir={run_dir}" in stopped.stdout
    step = status(run_dir)["step"]
    assert status(run_dir)["state"] == "interrupted"
    assert (run_dir / "checkpoints" / f"step_{step:06d}" / "manifest.json").exists()
    assert len(rows(run_dir)) == step < 8

    # Without run_dir the newest unfinished run below outputs/ is resumed.
    outputs = tmp_path / "outputs" / "quickstart"
    outputs.mkdir(parents=True)
    run_dir.rename(outputs / "run")
    result = launch("resume=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(outputs / "run", straight)


@pytest.mark.slow
def test_resume_keeps_the_first_records_and_config(tmp_path, straight):
    run_dir = tmp_path / "run"
    kill_after_step(run_dir, 1)
    kept = {file: file.read_bytes() for file in (run_dir / "config.yaml", run_dir / ".hydra" / "overrides.yaml")}
    result = launch("resume=true", f"run_dir={run_dir}", "checkpoint.every=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {file: file.read_bytes() for file in kept} == kept
    assert len(list((run_dir / ".hydra" / "resumes").iterdir())) == 1
    assert_same_run(run_dir, straight)


def test_a_finished_run_extended_to_more_steps_equals_a_run_that_had_them_from_the_start(tmp_path):
    steps = [*SETTINGS, "grpo.num_iterations=1", "grpo.lr_schedule=constant", "grpo.warmup_steps=0"]
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    for run_dir, count in ((whole, 6), (extended, 4)):
        assert launch(*steps, f"grpo.num_steps={count}", f"run_dir={run_dir}", cwd=tmp_path).returncode == 0
    refused = launch("resume=true", f"run_dir={extended}", "grpo.num_steps=3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "grpo.num_steps: 4 -> 3" in refused.stderr
    result = launch("resume=true", f"run_dir={extended}", "grpo.num_steps=6", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows(extended) == rows(whole)
    weights = [(run_dir / "final_model" / "model.safetensors").read_bytes() for run_dir in (whole, extended)]
    assert weights[0] == weights[1]
    assert "num_steps: 4\n" in (extended / "config.yaml").read_text()
    assert (extended / "changes.yaml").read_text() == "grpo.num_steps: 6\n"


@pytest.mark.slow
def test_an_incomplete_last_row_is_dropped_and_computed_again(tmp_path, straight):
    run_dir = tmp_path / "run"
    kill_after_step(run_dir, 3)
    file = run_dir / "metrics" / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 20)
    result = launch("resume=true", f"run_dir={run_dir}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, straight)


def test_an_until_step_that_the_run_has_passed_is_refused():
    with pytest.raises(ConfigError, match="until_step=20: the run is at step 50 already"):
        check_until(20, 50)
    for fine in (None, 50, 51):  # at step 50 its evaluation may still be missing
        check_until(fine, 50)


@pytest.mark.slow
def test_a_resume_that_fails_before_it_begins_leaves_the_state_of_a_finished_run(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SHORT, "grpo.num_steps=2", "grpo.lr_schedule=constant", f"run_dir={run_dir}"]
    assert launch(*settings, cwd=tmp_path).returncode == 0
    finished = status(run_dir)
    more = "grpo.num_steps=3"
    for place, fault, code in (
        ("grpo.training.experiment.load_model", "no memory for the model", 1),
        ("grpo.training.train.read_checkpoint", "term", 143),
    ):
        failed = resume(run_dir, more, fault=(place, "1", fault))
        assert failed.returncode == code, failed.stderr
        assert status(run_dir) | {"seconds": 0} == finished | {"seconds": 0}
        assert not (run_dir / "changes.yaml").exists()
    assert failed.stderr == ""
    checkpoint = run_dir / "checkpoints" / "step_000002"
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(b"")
    damaged = resume(run_dir, more)
    assert damaged.returncode == 2
    assert "none of the 1 checkpoints in" in damaged.stderr.splitlines()[-1]
    assert status(run_dir) | {"seconds": 0} == finished | {"seconds": 0}
    (checkpoint / "model.safetensors").write_bytes(weights)
    assert resume(run_dir, more).returncode == 0
    assert status(run_dir)["step"] == 3
