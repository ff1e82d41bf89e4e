"""`python -m grpo verify`: a run folder that its settings reproduce, and folders that they do not."""

import json
import os
import shutil

import pytest
import torch

from grpo.runs.checkpoint import StoredTensors, TrainerState, load_state, write_checkpoint
from tests.launches import SETTINGS, STEPS, grpo, launch


@pytest.fixture
def run(tmp_path, straight):
    """A copy of the run that was never stopped, with its only checkpoint, that of the last step."""
    return shutil.copytree(straight, tmp_path / "run")


@pytest.fixture
def verify(tmp_path):
    return lambda *arguments: grpo("verify", *arguments, cwd=tmp_path)


def everything(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_an_intact_folder_is_verified_from_the_first_step_to_its_checkpoint_and_left_unchanged(run, verify):
    before = everything(run)
    result = verify(f"run_dir={run}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checksums: 1 of 1 checkpoint folders are intact" in result.stdout
    assert f"replaying steps 1 to {STEPS}" in result.stdout
    verdict = result.stdout.splitlines()[-1]
    assert verdict == (
        f"equal: steps 1 to {STEPS}: every completion and metric, and the checkpoint of step {STEPS}: model, "
        "optimizer, progress"
    )
    assert everything(run) == before


def change_row(run, step, **changes):
    file = run / "metrics" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[step - 1] |= changes
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_row_is_reported(run, verify):
    change_row(run, 2, reward=2.8)
    result = verify(f"run_dir={run}", "step=3")
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("different: ")]
    assert line.startswith("different: step 2, reward: 2.8 in the folder, ")
    assert verify(f"run_dir={run}", "step=1").stdout.splitlines()[-1] == (
        "equal: steps 1 to 1: every completion and metric; no intact checkpoint of that step is kept, so weights were "
        "not compared"
    )


def test_differences_in_times_are_ignored(run, verify):
    change_row(run, 1, step_time=99.0, **{"timing_s/update": 98.0, "perf/tokens_per_s": 1.0})
    assert verify(f"run_dir={run}", "step=1").returncode == 0


def test_changed_weights_with_a_valid_manifest_are_reported(run, verify):
    checkpoint = run / "checkpoints" / f"step_{STEPS:06d}"
    tensors = {
        name: {key: value.clone() for key, value in StoredTensors(checkpoint / f"{name}.safetensors").items()}
        for name in ("model", "optimizer")
    }
    with torch.no_grad():
        tensors["model"]["model.norm.weight"][3] += 1e-6
    state: TrainerState = load_state(checkpoint)
    write_checkpoint(checkpoint, tensors, state)
    result = verify(f"run_dir={run}")
    assert result.returncode == 1
    assert f"different: step {STEPS}, model: model.norm.weight" in result.stdout


@pytest.mark.slow
def test_progress_and_optimizer_of_a_checkpoint_are_compared_too(verify, tmp_path):
    run = tmp_path / "small"
    settings = [*SETTINGS, "checkpoint.every=1", "checkpoint.keep_last=9", "grpo.num_iterations=1", "grpo.num_steps=3"]
    assert launch(*settings, f"run_dir={run}", cwd=tmp_path).returncode == 0
    assert "equal: steps 2 to 2" in verify(f"run_dir={run}", "step=2").stdout
    checkpoint = run / "checkpoints" / "step_000002"
    tensors = {
        name: {key: value.clone() for key, value in StoredTensors(checkpoint / f"{name}.safetensors").items()}
        for name in ("model", "optimizer")
    }
    state = load_state(checkpoint)
    write_checkpoint(checkpoint, tensors, TrainerState(**vars(state) | {"num_tokens": 5}))
    assert "different: step 2, num_tokens: 5 in the folder" in verify(f"run_dir={run}", "step=2").stdout
    del tensors["optimizer"]["0.exp_avg"]
    write_checkpoint(checkpoint, tensors, state)
    assert "different: step 2, optimizer: the checkpoint lacks 0.exp_avg" in verify(f"run_dir={run}", "step=2").stdout
    (checkpoint / "manifest.json").unlink()
    result = verify(f"run_dir={run}", "step=2")
    assert result.returncode == 1
    assert "damaged: checkpoints/step_000002: " in result.stdout
    assert "no intact checkpoint of that step is kept, so weights were not compared" in result.stdout


def test_a_missing_row_is_reported(run, verify):
    file = run / "metrics" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:]))
    result = verify(f"run_dir={run}", "step=2")
    assert result.returncode == 2
    assert "has gaps or repetitions" in result.stderr


def test_a_damaged_checkpoint_is_reported_and_the_steps_are_still_replayed(run, verify):
    os.truncate(run / "checkpoints" / f"step_{STEPS:06d}" / "model.safetensors", 100)
    result = verify(f"run_dir={run}", "step=2")
    assert result.returncode == 1
    assert f"damaged: checkpoints/step_{STEPS:06d}: model.safetensors is not " in result.stdout
    assert "different" not in result.stdout


def test_a_difference_is_reported_together_with_a_changed_version_or_machine(run, verify):
    change_row(run, 1, kl=5.0)
    file = run / "launches.jsonl"
    launch = json.loads(file.read_text())
    launch["environment"] |= {"torch": "2.11.0"}
    file.write_text(json.dumps(launch) + "\n")
    result = verify(f"run_dir={run}", "step=1")
    assert result.returncode == 1
    assert ", in the run it was 2.11.0" in result.stdout
    assert "numpy" not in result.stdout  # only what differs


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "verify needs a run folder"),
        (["run_dir=nowhere"], "run_dir=nowhere is not a run folder"),
        (["run_dir=RUN", "step=9"], "step=9: must be one of the completed steps, 1 to 8"),
        (["run_dir=RUN", "step=x"], "step=x: must be one of the completed steps, 1 to 8"),
    ],
)
def test_bad_input_is_refused_in_one_line(run, verify, arguments, said):
    result = verify(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {said}")
