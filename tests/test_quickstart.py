"""The quickstart: the results that it must reach, and controls which show that they are due to GRPO."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.tiny import MODEL_DIR

ROOT = Path(__file__).resolve().parent.parent


def quickstart(run_dir, *arguments):
    """Run the quickstart; returns its summary, its metrics rows and its duration in seconds."""
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "experiment=quickstart", f"run_dir={run_dir}", *arguments],
        cwd=run_dir.parent,
        check=True,
        timeout=600,
    )
    rows = [json.loads(line) for line in (run_dir / "metrics" / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run_dir / "summary.json").read_text()), rows, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_quickstart_learns_to_add(tmp_path, seed):
    summary, rows, seconds = quickstart(tmp_path / "run", f"seed={seed}")
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert before["n"] >= 400
    assert before["accuracy"] <= 0.5
    assert after["accuracy"] >= 0.9
    assert before["reward"] <= 1.6
    assert after["reward"] >= 2.5
    assert sum(row["reward"] for row in rows[-10:]) / 10 >= 2.5
    assert seconds < 180


@pytest.mark.slow
def test_nothing_is_learnt_from_rewards_shuffled_within_the_batch(tmp_path):
    # Measured on the completions sampled in training. Greedy answers change as soon as another option becomes the most
    # probable one, so chance alone changes their accuracy a lot (from 0.35 to between 0.15 and 0.58 over eight seeds).
    # A run with the true rewards gains 1.0.
    targets = [
        f"reward.components.{component}._target_=tests.shuffled_rewards.{function}"
        for component, function in (("correctness", "correctness"), ("format", "tag_format"))
    ]
    gains = []
    for seed in (1, 2, 3, 4):
        _, rows, _ = quickstart(tmp_path / str(seed), f"seed={seed}", "eval.before=false", "eval.after=false", *targets)
        correctness = [row["rewards/correctness/mean"] for row in rows]
        gains.append(sum(correctness[-10:]) / 10 - sum(correctness[:10]) / 10)
    assert len(set(gains)) == 4
    assert sum(gains) / 4 < 0.2


@pytest.mark.slow
def test_with_a_learning_rate_of_zero_no_weight_changes(tmp_path):
    summary, rows, _ = quickstart(
        tmp_path / "run", "optimizer.lr=0", "grpo.num_steps=3", "eval.max_problems=64", "tracking=disabled"
    )
    assert summary["eval"]["after"]["accuracy"] == summary["eval"]["before"]["accuracy"]
    weights, first = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "run" / "final_model", MODEL_DIR)
    )
    assert weights.keys() == first.keys()
    assert all(torch.equal(weights[name], first[name]) for name in first)
    assert [row["kl"] for row in rows] == [0.0, 0.0, 0.0]
    assert all(row["grad_norm"] > 0.1 for row in rows)
