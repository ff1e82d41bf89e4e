"""`python -m grpo replay`: stored completions with another reward or advantage."""

import json
import shutil

import numpy as np
import pytest

from grpo.analysis.audit import load_samples
from grpo.commands.replay import same_order
from tests.launches import grpo


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def replayed(run, *arguments):
    """What was printed, and the completions with their new scores."""
    file = run.parent / "replayed.jsonl"
    file.unlink(missing_ok=True)
    done = grpo("replay", f"run_dir={run}", f"output={file}", *arguments, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads(line) for line in file.read_text().splitlines()]


def test_without_changes_every_reward_and_advantage_is_the_stored_one(run):
    said, rows = replayed(run)
    assert len(rows) == len(load_samples(run)) > 0
    for row in rows:
        for name, value in row["replayed"].items():
            assert value == pytest.approx(row[name], abs=1e-6), name
    assert "pairs of completions of a group in the same order: 100.0%" in said
    assert "->" not in said


def test_another_reward_and_another_advantage_change_the_scores(run):
    said, rows = replayed(run, "reward.components.format.weight=0", "objective.advantage=none")
    for row in rows:
        assert row["replayed"]["rewards/format"] == row["rewards/format"]
        assert row["replayed"]["reward"] == pytest.approx(row["rewards/correctness"])
    by_problem = {}
    for row in rows:
        by_problem.setdefault((row["step"], row["problem_id"]), []).append(row["replayed"])
    for group in by_problem.values():
        mean = np.mean([each["reward"] for each in group])
        assert [each["advantage"] for each in group] == pytest.approx([each["reward"] - mean for each in group])
    assert "advantage " in said
    assert "->" in said


def test_a_reward_of_the_user_can_be_added(run):
    (run.parent / "mine.py").write_text(
        "def brief(completions, **_):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    said, rows = replayed(run, "+reward.components.brief={_target_: mine.brief, weight: 0.1}")
    assert all(row["replayed"]["rewards/brief"] == -len(row["completion"]) for row in rows)
    assert "brief" in said


def test_rewards_get_the_progress_of_training_and_missing_values_stay_missing(run):
    code = """
def progress(completions, trainer_state, **_):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def none(completions, **_):
    return [None for _ in completions]
"""
    (run.parent / "mine.py").write_text(code)
    more = ["+reward.components.progress={_target_: mine.progress}", "+reward.components.none={_target_: mine.none}"]
    _, rows = replayed(run, *more)
    steps = max(row["step"] for row in rows)
    for row in rows:
        assert row["replayed"]["rewards/progress"] == pytest.approx((row["step"] - 1) / steps)
        assert row["replayed"]["rewards/none"] is None


def test_a_run_whose_data_has_moved_is_replayed_with_rewards_that_need_no_column(run):
    _, rows = replayed(run, "data=jsonl", "data.path=/no/such", "data.system_prompt=null", "data.max_prompt_length=9")
    assert all(row["replayed"]["reward"] == pytest.approx(row["reward"], abs=1e-6) for row in rows)


def test_the_order_of_the_files_does_not_matter(run):
    last = sorted(run.glob("samples/*.jsonl"))[-1]
    last.rename(last.with_name("step_000000.jsonl"))
    said, _ = replayed(run)
    assert "same order: 100.0%" in said
    assert "->" not in said


def test_pairs_are_compared_within_groups_and_with_ties():
    one = np.array([1.0, 2.0, 0.0, 0.0])
    assert same_order(one, one * 3, 2) == 1.0
    assert same_order(one, np.array([2.0, 1.0, 0.0, 0.0]), 2) == 0.5
    assert same_order(one, np.array([1.0, 2.0, 0.0, 0.1]), 2) == 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "replay needs a run folder: python -m grpo replay run_dir=outputs/..."),
        (["run_dir=run", "objective.advantage=x"], "objective.advantage=x: must be group or batch or"),
        (
            ["run_dir=run", "+reward.components.x._target_=mine.ids"],
            "x takes completion_ids, which samples/",
        ),
        (["run_dir=run", "output=mine.py"], "output=mine.py exists already; remove it, or give another file"),
        (["run_dir=run", "output=run/samples/step_000099.jsonl"], "this folder is for the completions of training"),
        (["run_dir=torn"], "which are not whole groups of"),
        (["run_dir=empty"], "stores no completions: set samples.every in a run, such as samples.every=1"),
    ],
)
def test_an_impossible_replay_is_refused_in_one_line(run, arguments, said):
    (run.parent / "mine.py").write_text(
        "def ids(completions, completion_ids):\n    return [0.0 for _ in completions]\n"
    )
    shutil.copytree(run, run.parent / "empty")
    shutil.rmtree(run.parent / "empty" / "samples")
    torn = next(shutil.copytree(run, run.parent / "torn").glob("samples/*.jsonl"))
    torn.write_text("".join(torn.read_text().splitlines(keepends=True)[:-1]))
    refused = grpo("replay", *arguments, cwd=run.parent)
    assert refused.returncode == 2
    assert said in refused.stderr.splitlines()[-1]
