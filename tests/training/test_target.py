"""target.accuracy: the run says when it reached the accuracy, and ends there if it is to."""

import json

import pytest

from grpo.analysis.sweep import SweepAnalysis
from grpo.analysis.target import time_to_target
from grpo.runs.folder import RunFolder
from tests.launches import SETTINGS, launch, rows, status

EVALUATED = [*SETTINGS, "eval.every=2"]  # 8 steps


def accuracies(run_dir):
    evaluations = {each["step"]: each["accuracy"] for each in RunFolder(run_dir).choosing_evaluations() if each["step"]}
    return dict(sorted(evaluations.items()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a target."""
    cwd = tmp_path_factory.mktemp("whole")
    assert launch(*EVALUATED, "run_dir=run", cwd=cwd).returncode == 0
    return cwd / "run"


@pytest.fixture(scope="module")
def reachable(whole):
    """A target and the step at which the run without a target has it first, which is neither its first nor last one."""
    found = accuracies(whole)
    firsts = {accuracy: min(s for s, each in found.items() if each >= accuracy) for accuracy in found.values()}
    accuracy, step = next((a, s) for a, s in firsts.items() if a > 0 and s in (2, 4, 6))
    return accuracy, step


def test_a_run_ends_at_its_target_as_the_run_without_one_was_there(whole, reachable, tmp_path):
    accuracy, step = reachable
    done = launch(*EVALUATED, f"target.accuracy={accuracy}", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert rows(run) == rows(whole)[:step]
    assert (status(run)["state"], status(run)["step"]) == ("finished", step)
    assert (run / "final_model" / "model.safetensors").exists()
    assert (run / "checkpoints" / f"step_{step:06d}").is_dir()
    summary = json.loads((run / "summary.json").read_text())
    seconds = sum(row["step_time"] for row in RunFolder(run).metrics())
    assert summary["target"] == {
        "accuracy": accuracy,
        "reached": {"step": step, "seconds": pytest.approx(seconds), "accuracy": accuracies(whole)[step]},
    }
    assert f"target of {accuracy:.1%} reached after step {step}" in done.stdout
    assert f"Target of {accuracy:.1%} reached after step {step}" in (run / "report.html").read_text()
    assert "target.stop=false" in done.stdout
    assert f"| steps | {step}, of 3 prompts" in (run / "final_model" / "README.md").read_text()

    refused = launch("resume=true", "run_dir=run", cwd=tmp_path)
    assert refused.stderr.splitlines()[-1].endswith("has finished already; to train it further, add target.stop=false")
    further = launch("resume=true", "run_dir=run", "target.stop=false", cwd=tmp_path)
    assert further.returncode == 0, further.stderr
    assert rows(run) == rows(whole)
    assert f"target of {accuracy:.1%} reached after step {step}" in further.stdout


def test_a_target_that_only_marks_changes_nothing_else(whole, reachable, tmp_path):
    accuracy, step = reachable
    target = [f"target.accuracy={accuracy}", "target.stop=false"]
    done = launch(*EVALUATED, *target, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == rows(whole)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["target"]["reached"]["step"] == step


@pytest.mark.parametrize("place", ["save_best", "show"])
def test_a_run_killed_at_its_target_ends_there_when_it_is_resumed(whole, reachable, tmp_path, place):
    """Killed after the evaluation was written, and after the checkpoint of that step was written."""
    accuracy, step = reachable
    number = {"save_best": len(new_bests(whole, step)), "show": step}[place]
    fault = (f"grpo.training.recorder.Recorder.{place}", str(number), "kill")
    killed = launch(*EVALUATED, f"target.accuracy={accuracy}", "run_dir=run", cwd=tmp_path, fault=fault)
    assert killed.returncode == -9
    assert accuracies(tmp_path / "run")[step] >= accuracy
    resumed = launch("resume=true", "run_dir=run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rows(tmp_path / "run") == rows(whole)[:step]
    assert status(tmp_path / "run")["state"] == "finished"


def new_bests(run, last):
    """The steps up to `last` at which the accuracy was higher than before."""
    found = accuracies(run)
    steps = [step for step in found if step <= last]
    bests = [step for step in steps if all(found[each] < found[step] for each in steps if each < step)]
    assert bests[-1] == last
    return bests


def test_an_evaluation_of_a_pause_does_not_count(whole, reachable, tmp_path):
    """Between the evaluations of eval.every, so that the paused run ends where the other one does."""
    accuracy, step = reachable
    command = [*SETTINGS, f"eval.every={step}", "eval.after=true", f"target.accuracy={accuracy / 100}"]
    assert launch(*command, "run_dir=run", "until_step=1", cwd=tmp_path).returncode == 0
    assert RunFolder(tmp_path / "run").evaluation_at(1) is not None
    assert launch("resume=true", "run_dir=run", cwd=tmp_path).returncode == 0
    assert status(tmp_path / "run")["step"] >= step


def test_a_target_out_of_reach_is_said_and_all_steps_are_trained(whole, tmp_path):
    assert max(accuracies(whole).values()) < 1
    done = launch(*EVALUATED, "target.accuracy=1", "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "target of 100.0% not reached" in done.stdout
    assert len(rows(tmp_path / "run")) == 8
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["target"] == {"accuracy": 1, "reached": None}


def test_a_sweep_has_the_time_to_the_target_in_its_table(reachable, tmp_path):
    accuracy, step = reachable
    command = ["-m", *EVALUATED, f"target.accuracy={accuracy}", "target.stop=true,false", "sweep_dir=sweep"]
    done = launch(*command, "hydra/launcher=basic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    jobs = SweepAnalysis(tmp_path / "sweep").jobs
    assert jobs["steps_to_target"].tolist() == [step, step]
    assert jobs["step"].tolist() == [step, 8]
    assert (jobs["minutes_to_target"] > 0).all()
    assert "minutes_to_target" in (tmp_path / "sweep" / "report.html").read_text()


def test_the_first_evaluation_that_reaches_it_counts_and_not_the_untrained_model(whole):
    run = RunFolder(whole)
    found = accuracies(whole)
    first = min(step for step, each in found.items() if each > 0)
    config = {"eval": {"every": 2}, "target": {"accuracy": 1e-9}}
    assert time_to_target(run, config)["step"] == first
    assert time_to_target(run, config, up_to_step=first - 1) is None
    assert time_to_target(run, config | {"parent": {"step": first}})["step"] == first + 2
    later = time_to_target(run, config | {"eval": {"every": 8}})
    assert later["step"] == 8  # the others are no evaluations of eval.every then


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["target.accuracy=0.5"], "target.accuracy=0.5 needs evaluations during training: set eval.every, such as 10"),
        (["target.accuracy=90", "eval.every=2"], "target.accuracy=90.0: must be 1 or less; a share, such as 0.9"),
        (["target.accuracy=0", "eval.every=2"], "target.accuracy=0.0: must be above 0; a share, such as 0.9"),
        (
            ["-m", "hydra/sweeper=halving", "target.accuracy=0.5", "eval.every=2", "optimizer.lr=1e-4,2e-4"],
            "hydra/sweeper=halving compares arms after equal steps: set target.stop=false",
        ),
    ],
)
def test_a_target_that_cannot_be_checked_is_refused(tmp_path, arguments, said):
    refused = launch(*SETTINGS, *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == f"error: {said}"
    assert not (tmp_path / "outputs").exists()
