"""A run that was stopped and goes on gives, byte for byte, what a run that was never stopped gives."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
# Two outer iterations of four steps with two updates each: the reference moves, and old and new policy differ.
SETTINGS = [
    "experiment=quickstart",
    "grpo.num_iterations=2",
    "grpo.num_steps=4",
    "grpo.mu=2",
    "grpo.batch_size=3",
    "grpo.num_generations=4",
    "grpo.lr_schedule=linear",
    "grpo.warmup_steps=2",
    "checkpoint.every=2",
    "samples.every=1",
    "eval.before=false",
    "eval.after=false",
    "tracking=disabled",
]
NOT_COMPARED = ("step_time", "timing_s/", "perf/")


def launch(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(LAUNCH), *arguments], cwd=cwd, capture_output=True, text=True, timeout=180
    )


def start(run_dir, *arguments):
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), *SETTINGS, f"run_dir={run_dir}", *arguments],
        cwd=run_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(run_dir):
    file = run_dir / "metrics" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOT_COMPARED)} for line in lines]


def wait_for_step(run_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = run_dir / "metrics" / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def digests(run_dir):
    files = [*run_dir.glob("checkpoints/step_000008/*.safetensors"), *run_dir.glob("final_model/*.safetensors")]
    files += run_dir.glob("samples/*.jsonl")
    assert len(files) == 3 + 1 + 8
    return {str(file.relative_to(run_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing stops."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = launch(*SETTINGS, f"run_dir={run_dir}", cwd=run_dir.parent)
    assert result.returncode == 0, result.stderr
    return run_dir


def assert_same_run(run_dir, straight):
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 9))
    assert rows(run_dir) == rows(straight)
    assert digests(run_dir) == digests(straight)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(1, id="before the first checkpoint"),
        pytest.param(4, id="at the boundary of the iterations"),
        pytest.param(7, id="in the second iteration"),
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_in_progress_and_resume_is_bitwise_equal(tmp_path, straight, number, code):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"go on with: python launch.py resume=true run_dir={run_dir.relative_to(tmp_path)}" in output
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert (run_dir / "checkpoints" / f"step_{status['step']:06d}" / "manifest.json").exists()
    assert len(rows(run_dir)) == status["step"] < 8

    # Without run_dir the newest unfinished run below outputs/ is taken.
    outputs = tmp_path / "outputs" / "quickstart"
    outputs.mkdir(parents=True)
    run_dir.rename(outputs / "run")
    result = launch("resume=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(outputs / "run", straight)


def test_resume_keeps_the_first_records_and_config(tmp_path, straight):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 1)
    process.kill()
    process.wait()
    kept = {file: file.read_bytes() for file in (run_dir / "config.yaml", run_dir / ".hydra" / "overrides.yaml")}
    result = launch("resume=true", f"run_dir={run_dir}", "checkpoint.every=3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {file: file.read_bytes() for file in kept} == kept
    assert len(list((run_dir / ".hydra" / "resumes").iterdir())) == 1
    assert_same_run(run_dir, straight)


def test_a_finished_run_that_gets_more_steps_is_one_that_had_them_from_the_start(tmp_path):
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


def test_a_torn_last_row_is_mended(tmp_path, straight):
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 3)
    process.kill()
    process.wait()
    file = run_dir / "metrics" / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 20)
    result = launch("resume=true", f"run_dir={run_dir}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(run_dir, straight)
