"""The halving sweep: the arithmetic of its budget, and that its runs equal runs that never stopped."""

import json
import re

import pytest

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.runs.folder import RunFolder
from grpo.runs.halving_state import HalvingState, best_arms, choose_ladder, ladder, seconds
from grpo.runs.sweep_folder import SweepFolder
from tests.launches import ROOT, launch, rows
from tests.sweeps.test_sweep import QUICK


def test_ladders_equal_ones_computed_by_hand():
    assert ladder(90, 9, 3, 10) == [(10, 9), (30, 3), (90, 1)]
    assert ladder(100, 4, 3, 20) == [(20, 4), (100, 1)]  # one arm is left: it does all remaining steps
    assert ladder(100, 9, 3, 50) == [(50, 9), (100, 3)]
    assert ladder(100, 9, 3, 100) == [(100, 9)]  # the full sweep
    # 9 jobs of 10 steps, 3 of 20 more, 1 of 60 more, at 2 seconds per step; and 13 starts of 5 seconds.
    assert seconds(ladder(90, 9, 3, 10), 1, 2.0, 5.0) == 2 * (90 + 60 + 60) + 13 * 5
    assert seconds([(10, 2)], 3, 2.0, 5.0) == 2 * 3 * 25


def record(budget_hours, arms=9):
    return HalvingState(90, [[n] for n in range(arms)], 3, budget_hours, step_s=36.0, start_s=0.0)


def test_the_first_rung_is_as_long_as_the_budget_allows():
    assert choose_ladder(record(None)) == [(10, 9), (30, 3), (90, 1)]
    assert choose_ladder(record(8.1)) == [(90, 9)]  # 9 * 90 steps of 36 s
    chosen = choose_ladder(record(3.0))
    longer = ladder(90, 9, 3, chosen[0][0] + 1)
    assert record(3.0).seconds(chosen) <= 3 * 3600 < record(3.0).seconds(longer)
    with pytest.raises(ValueError, match=r"^\d"):
        choose_ladder(record(0.2))


def test_the_best_arms_are_kept_and_those_without_a_score_are_dropped():
    assert best_arms([0.2, None, 0.7, 0.9, 0.1], [0.0, None, 0.0, 0.0, 0.0], 2) == [3, 2]
    assert best_arms([None, 0.5], [None, 0.1], 2) == [1]


def test_of_arms_with_equal_scores_the_one_with_the_higher_reward_is_kept():
    assert best_arms([0.4, 0.4, 0.4], [0.9, 1.3, 1.1], 2) == [1, 2]
    assert best_arms([0.4, 0.4, 0.5], [1.0, 1.0, 0.1], 2) == [2, 0]
    # The worst arm is the first; without an evaluation that separates them, the reward decides.
    assert best_arms([0.4, 0.4], [0.2, 0.3], 1) == [1]


def test_only_as_many_arms_continue_as_the_rest_of_the_budget_allows():
    halving = record(1.0)
    halving.ladder = [(10, 9), (30, 3), (90, 1)]
    # An arm of the second rung takes 20 steps of 36 s: 720 s.
    assert halving.affordable([2, 0, 1], 1, spent=3600 - 1500.0) == [2, 0]
    assert halving.affordable([2, 0, 1], 1, spent=3700.0) == []
    assert halving.affordable([2, 0, 1], 0, spent=3700.0) == [2, 0, 1]  # the first rung has begun already
    assert record(None).affordable([2, 0, 1], 1, spent=3700.0) == [2, 0, 1]


HALVING = [
    "hydra/sweeper=halving",
    "hydra/launcher=basic",
    *(each for each in QUICK if each != "eval.after=false"),
    "eval.max_problems=60",
    "grpo.num_steps=4",
    "grpo.batch_size=8",
    "grpo.num_generations=8",
    "sweep.eta=2",
    "optimizer.lr=0,0.00001,0.0005,0.0001",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A halving sweep that was never stopped: its working directory and its finished launch."""
    cwd = tmp_path_factory.mktemp("halving")
    done = launch("-m", *HALVING, "sweep_dir=sweep", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


def assert_equal(run_dir, other):
    """Compare every metric, and every byte of the last checkpoint and of the final model."""
    assert rows(run_dir) == rows(other)
    for pattern in ("checkpoints/*/*.safetensors", "final_model/*.safetensors"):
        files = sorted(run_dir.glob(pattern))
        assert [file.relative_to(run_dir) for file in files] == [
            f.relative_to(other) for f in sorted(other.glob(pattern))
        ]
        assert all(file.read_bytes() == (other / file.relative_to(run_dir)).read_bytes() for file in files)
    assert list(run_dir.glob("checkpoints/*/model.safetensors"))


def test_arms_stop_early_and_the_best_arm_equals_the_same_run_without_a_sweep(straight):
    cwd, done = straight
    halving = json.loads((cwd / "sweep" / "halving.json").read_text())
    assert halving["ladder"] == [[1, 4], [2, 2], [4, 1]]
    assert [len(rung["kept"]) for rung in halving["rungs"]] == [2, 1, 1]
    (best,) = halving["rungs"][-1]["kept"]
    jobs = SweepFolder(cwd / "sweep").jobs()
    assert [job["state"] for job in jobs].count("stopped early") == 3
    assert jobs[best]["state"] == "finished"
    assert sorted(len(rows(cwd / "sweep" / job["folder"])) for job in jobs) == [1, 1, 2, 4]
    assert SweepFolder(cwd / "sweep").record()["state"] == "finished"
    whole = [each for each in HALVING if not each.startswith(("hydra/", "optimizer.lr"))]
    alone = launch(*whole, jobs[best]["overrides"][0], "run_dir=alone", cwd=cwd)
    assert alone.returncode == 0, alone.stderr
    assert_equal(cwd / "sweep" / jobs[best]["folder"], cwd / "alone")
    assert (cwd / "alone" / "final_model").exists()
    lines = done.stdout.splitlines()
    rung = lines.index("rung 1 of 3, step 1: 2 of 4 arms are kept")
    shown = [
        re.match(r"  (kept   |stopped)  optimizer.lr=\S+: score \d\.\d{3}, reward ", each) for each in lines[rung + 1 :]
    ]
    assert [each[1].strip() for each in shown[:4]] == ["kept", "kept", "stopped", "stopped"]
    page = (cwd / "sweep" / "report.html").read_text()
    assert "Rungs and budget" in page
    assert f"resume    python {ROOT / 'launch.py'} -m" not in done.stdout


@pytest.mark.slow
def test_a_killed_halving_sweep_resumes_to_the_same_decisions(straight):
    cwd, _ = straight
    fault = ("grpo.training.groups.group_keys", "6", "kill")  # of 8 steps in all: in the second rung
    assert launch("-m", *HALVING, "sweep_dir=killed", cwd=cwd, fault=fault).returncode == -9
    made = [RunFolder(cwd / "killed" / job["folder"]) for job in SweepFolder(cwd / "killed").jobs()]
    assert all(run.status()["seconds"] > sum(row["step_time"] for row in run.metrics()) for run in made)
    again = launch("-m", *HALVING, "sweep_dir=killed", "resume=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    one, other = (json.loads((cwd / name / "halving.json").read_text())["rungs"] for name in ("sweep", "killed"))
    assert [(rung["steps"], rung["scores"], rung["kept"]) for rung in one] == [
        (rung["steps"], rung["scores"], rung["kept"]) for rung in other
    ]
    for job in SweepFolder(cwd / "sweep").jobs():
        assert_equal(cwd / "killed" / job["folder"], cwd / "sweep" / job["folder"])


@pytest.mark.slow
def test_a_budget_that_is_too_small_is_refused_with_the_minimum_and_a_larger_one_resumes(tmp_path):
    command = ["-m", *(each for each in HALVING if not each.startswith("optimizer.lr")), "optimizer.lr=0,0.0001"]
    command += ["sweep_dir=sweep", "grpo.batch_size=2", "grpo.num_generations=4"]
    refused = launch(*command, "sweep.budget_hours=0.0001", cwd=tmp_path)
    assert refused.returncode == 2
    assert "hours; raise it, or sweep fewer values" in refused.stderr
    still = launch(*command, "resume=true", cwd=tmp_path)
    assert (still.returncode, "sweep.budget_hours=0.0001" in still.stderr) == (
        2,
        True,
    )  # the budget stays unless a new one is given
    more = launch(*command, "sweep.budget_hours=1", "resume=true", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    halving = json.loads((tmp_path / "sweep" / "halving.json").read_text())
    assert (halving["ladder"], halving["state"]) == ([[4, 2]], "finished")  # enough for all arms to the last step


TROUBLE = """
import os
import signal
from pathlib import Path


def trouble(completions, **columns):
    armed = Path("armed").read_text() if Path("armed").exists() else ""
    if armed == "stop":
        Path("armed").unlink()  # for one job
        os.kill(os.getpid(), signal.SIGTERM)
    return fail(completions, on=armed == "fail")


def fail(completions, on, **columns):
    if on:
        raise OSError("no space left on device")
    return [0.0] * len(completions)
"""


@pytest.mark.slow
def test_an_arm_that_fails_twice_is_dropped_and_the_others_continue(tmp_path):
    (tmp_path / "mine.py").write_text(TROUBLE)
    command = [each for each in HALVING if not each.startswith("optimizer.lr")]
    command += ["+reward.components.t={_target_: mine.fail, weight: 0}", "+reward.components.t.on=1,0"]
    command = ["-m", *command, "sweep.budget_hours=1", "sweep_dir=sweep"]
    first = launch(*command, cwd=tmp_path)
    assert (first.returncode, "no space left" in first.stderr, "Traceback" in first.stderr) == (1, True, False)
    assert [job["state"] for job in SweepFolder(tmp_path / "sweep").jobs()] == ["failed", "finished"]
    again = launch(*command, "resume=true", cwd=tmp_path)
    assert (again.returncode, "job 0 failed in an earlier launch, so its arm is excluded" in again.stderr) == (1, True)


@pytest.mark.slow
def test_a_rung_is_decided_only_when_all_its_jobs_have_reached_it(tmp_path):
    (tmp_path / "mine.py").write_text(TROUBLE)
    (tmp_path / "armed").write_text("fail")
    command = ["-m", *(each for each in HALVING if not each.startswith(("optimizer.lr", "hydra/launcher")))]
    command.append("optimizer.lr=0,0.0001")
    command += ["+reward.components.t={_target_: mine.trouble, weight: 0, isolate: false}", "sweep_dir=sweep"]
    command += ["grpo.batch_size=2", "grpo.num_generations=4"]
    failed = launch(*command, "hydra/launcher=basic", cwd=tmp_path)
    assert failed.returncode == 1
    assert json.loads((tmp_path / "sweep" / "halving.json").read_text())["rungs"] == []
    first, _ = SweepFolder(tmp_path / "sweep").jobs()
    assert len(RunFolder(tmp_path / "sweep" / first["folder"]).launches()) == 2  # it was tried a second time

    (tmp_path / "armed").write_text("stop")
    stopped = launch(*command, "hydra/launcher=local", "resume=true", cwd=tmp_path)
    assert stopped.returncode == 1
    assert "was stopped before step 2, so its rung is not decided" in stopped.stderr
    assert f"resume    python {ROOT / 'launch.py'} -m" in stopped.stdout

    done = launch(*command, "hydra/launcher=basic", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "sweep" / "halving.json").read_text())
    assert (record["state"], len(record["rungs"][0]["scores"])) == ("finished", len(record["arms"]))


@pytest.mark.parametrize(("key", "value"), [("sweep.eta", "1"), ("sweep.budget_hours", "0"), ("until_step", "0")])
def test_impossible_values_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=key):
        typed(compose_config(["experiment=quickstart", f"{key}={value}"]))


def test_arms_with_different_numbers_of_steps_are_refused(tmp_path):
    refused = launch("-m", *HALVING, "grpo.num_steps=2,4", cwd=tmp_path)
    assert (refused.returncode, "leave grpo.num_steps out" in refused.stderr) == (2, True)
