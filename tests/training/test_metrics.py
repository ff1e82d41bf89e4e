"""Tests of the metrics of a step."""

import json
import math
import statistics

import pytest
import torch
from transformers import TrainerState

from grpo.rewards.scoring import Rewards
from grpo.runs.folder import RunFolder
from grpo.training.metrics import reward_metrics
from grpo.training.scored_completions import ScoredCompletions
from tests.launches import SHORT, grpo, launch, rows, status

NAN = math.nan


def scored(**components):
    """Completions with these values of the components, all with weight 1."""
    values = {name: torch.tensor(each, dtype=torch.float64) for name, each in components.items()}
    stacked = torch.stack([*values.values()], dim=-1)
    total = stacked.nansum(dim=-1).where(~stacked.isnan().all(dim=-1), NAN)
    rewards = Rewards(values, torch.ones(len(values), dtype=torch.float64), total)
    return ScoredCompletions([], rewards, {}, TrainerState(), [], [], torch.zeros(len(total)))


def test_the_spread_of_the_reward_is_measured_over_the_batch_and_within_groups():
    row = reward_metrics(scored(a=[0.0, 2.0, 4.0, 4.0]), group_size=2)
    assert row["reward"] == 2.5
    assert row["reward_std"] == pytest.approx(statistics.stdev([0, 2, 4, 4]))  # TRL's reward_std
    assert row["reward_group_std"] == pytest.approx((math.sqrt(2) + 0) / 2)
    assert row["frac_reward_zero_std"] == 0.5


def test_missing_rewards_are_not_part_of_the_metrics():
    row = reward_metrics(scored(a=[1.0, NAN, 3.0, NAN, NAN, NAN], b=[0.0, NAN, 0.0, NAN, 1.0, 1.0]), group_size=3)
    assert row["reward"] == pytest.approx((1 + 3 + 1 + 1) / 4)
    assert row["reward_std"] == pytest.approx(statistics.stdev([1, 3, 1, 1]))
    assert row["reward_group_std"] == pytest.approx((math.sqrt(2) + 0) / 2)  # of (1, 3) and (1, 1)
    assert row["frac_reward_zero_std"] == 0.5
    assert (row["rewards/a/mean"], row["rewards/a/std"]) == (2.0, pytest.approx(math.sqrt(2)))


def test_without_any_value_the_metrics_of_the_reward_are_null():
    row = reward_metrics(scored(a=[NAN, NAN, NAN, NAN]), group_size=2)
    assert row.pop("frac_reward_zero_std") == 1.0
    assert set(row.values()) == {None}


REWARDS = """
def never(completions, **columns):
    return [None] * len(completions)


def every_second(completions, **columns):
    return [float(i) if i % 2 else None for i in range(len(completions))]
"""


def test_a_run_whose_rewards_are_all_missing_finishes(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    only = ["~reward.components.format", "reward.components.correctness={_target_: mine.never}"]
    done = launch(*SHORT, *only, "grpo.num_steps=2", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [row["reward"] for row in rows(run)] == [None, None]
    assert [row["frac_reward_zero_std"] for row in rows(run)] == [1.0, 1.0]
    assert status(run)["best_reward"] is None
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert {(each["reward"], each["advantage"]) for each in samples} == {(None, 0.0)}
    assert (run / "report.html").exists()


def test_problems_without_a_value_of_the_accuracy_are_neither_right_nor_wrong(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS)
    every_second = "++eval.accuracy._target_=mine.every_second"
    settings = [*SHORT, "grpo.num_steps=1", "eval.before=true", "eval.max_problems=8", every_second]
    done = launch(*settings, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = RunFolder(tmp_path / "run").evaluation("before")
    assert (result["n"], result["missing"], result["accuracy"]) == (2, 2, 1.0)
    assert "eval.accuracy gave no value for 2 of 4 test problems" in done.stdout
    never = grpo("evaluate", "run_dir=run", "++eval.accuracy._target_=mine.never", cwd=tmp_path)
    assert never.returncode == 0, never.stderr
    (file,) = (tmp_path / "run" / "eval").glob("evaluate_*.json")
    result = json.loads(file.read_text())
    assert (result["n"], result["missing"], result["accuracy"]) == (0, 4, None)


def test_a_row_of_an_earlier_version_has_its_spread_under_the_present_name(tmp_path):
    run = RunFolder(tmp_path)
    written = [{"step": 1, "reward_std": 0.5}, {"step": 2, "reward_std": 2.0, "reward_group_std": 0.4}]
    run.write_metrics(written)
    assert run.metrics() == [{"step": 1, "reward_group_std": 0.5}, written[1]]
    assert run.truncate_metrics(2) == written  # what is in the file stays as it is


@pytest.mark.parametrize(("rate", "moves"), [("1e-6", True), ("1e-20", False)])
def test_weights_that_did_not_move_are_seen_and_reported(tmp_path, rate, moves):
    """A step of 1e-20 is far below the spacing of float32 numbers of the size of weights."""
    settings = ["grpo.warmup_steps=0", f"optimizer.lr={rate}", "grpo.num_steps=6"]
    done = launch(*SHORT, *settings, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    changed = [row["weights_changed"] for row in rows(tmp_path / "run")]
    assert all(each > 0.5 for each in changed) if moves else changed == [0.0] * 6
    assert ("doctor: the last 5 updates had a gradient and changed no weight" in done.stdout) is not moves
