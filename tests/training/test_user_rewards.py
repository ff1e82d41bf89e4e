"""Reward functions of a user in real runs: what they are given, and what happens if they fail."""

import json
import signal
import time

import pytest
from transformers import TrainerState

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.training.scored_completions import trainer_state
from tests.launches import SHORT, launch, rows, status

ONE_STEP = [*SHORT, "grpo.num_steps=1"]
HERE = ["reward.isolate=false"]
MINE = """
import json
import os
import sys


def progress(completions, trainer_state, **columns):
    with open("progress", "a") as file:
        file.write(f"{trainer_state.global_step}/{trainer_state.max_steps} ")
    return [0.0] * len(completions)


async def later(completions, **columns):
    return [1.0] * len(completions)


def leaves(completions):
    sys.exit(0)


def computes(completions):
    return [float(sum(range(10**12)))] * len(completions)


def fails(completions):
    raise ValueError("as asked")


def needs(completions, level):
    return [0.0 if each is None else each for each in level]


def logs(completions, log_metric):
    return [0.0] * len(completions)
"""


@pytest.fixture
def folder(tmp_path):
    """The folder of a user, with a file of rewards."""
    here = tmp_path / "user"
    here.mkdir()
    (here / "mine.py").write_text(MINE)
    return here


def component(name):
    return f"+reward.components.mine={{_target_: mine.{name}, weight: 1.0}}"


def with_columns(folder, **columns):
    """A data set in which only the first training problem has these columns."""
    problems = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    for name in ("train", "test"):
        lines = [problems[0] | columns, *problems[1:]] if name == "train" else problems
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return f"data.path={folder}"


def test_a_function_can_ask_for_the_progress_of_training_as_in_trl(folder):
    done = launch(*SHORT, "grpo.num_steps=2", component("progress"), "run_dir=run", "eval.after=true", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "progress").read_text().split() == [
        "0/2",
        "0/2",
        "1/2",
        "2/2",
        "2/2",
    ]  # pre-flight, steps, evaluations


def test_an_async_function_is_a_component(folder):
    done = launch(*ONE_STEP, component("later"), "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert rows(folder / "run")[0]["rewards/mine/mean"] == 1.0


def test_a_run_whose_process_has_to_be_killed_is_recorded_as_failed(folder):
    killed = launch(*ONE_STEP, component("computes"), "reward.timeout_s=0.5", *HERE, "run_dir=run", cwd=folder)
    assert killed.returncode == -signal.SIGKILL
    reason = "RewardError: reward component 'mine' took longer than 0.5 s, and could not be ended"
    assert killed.stderr.splitlines()[-1] == f"failed: {reason}"
    deadline = time.monotonic() + 10
    while status(folder / "run")["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (status(folder / "run")["state"], status(folder / "run")["error"]) == ("failed", reason)
    assert not list((folder / "run").glob("*.watchdog"))
    again = launch("resume=true", "run_dir=run", "++reward.components.mine._target_=mine.later", cwd=folder)
    assert again.returncode == 2  # another function is another experiment; but the folder is not in use
    assert "was started with other values" in again.stderr


@pytest.mark.parametrize(("name", "said"), [("leaves", "SystemExit: 0"), ("fails", "ValueError: as asked")])
def test_a_function_that_fails_or_exits_fails_the_run_with_its_name_and_line(folder, name, said):
    failed = launch(*ONE_STEP, component(name), "run_dir=run", cwd=folder)
    assert failed.returncode == 1
    line = 1 + MINE.splitlines().index(f"def {name}(completions):") + 1
    reason = f"RewardError: reward component 'mine' raised {said} ({folder / 'mine.py'}, line {line})"
    assert reason in failed.stderr.splitlines()[-1]
    assert (status(folder / "run")["state"], status(folder / "run")["error"]) == ("failed", reason)


def test_a_function_that_needs_an_argument_which_it_will_not_get_is_refused(folder):
    refused = launch(*ONE_STEP, component("logs"), "run_dir=run", cwd=folder)
    assert refused.returncode == 2
    assert "error: reward.components.mine: it gets only id, question, answer, " in refused.stderr
    assert "missing a required argument: 'log_metric'" in refused.stderr
    assert not (folder / "run").exists()


def test_a_column_of_a_single_problem_is_passed_for_every_batch(folder):
    data = with_columns(folder, level=0.5)
    done = launch(*ONE_STEP, data, component("needs"), "grpo.batch_size=2", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_a_column_named_like_a_setting_does_not_replace_it(folder):
    data = with_columns(folder, exact="no number", tag_reward="no number")
    done = launch(*ONE_STEP, data, "grpo.batch_size=9", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "reward.components.correctness.exact is a setting, so the function does not get" in done.stderr + done.stdout


LEAVING = """
import sys
sys.exit(0)
"""
LEAVING_OBJECT = """
import sys


class Brief:
    def __init__(self):
        sys.exit(0)

    def __call__(self, completions):
        return [0.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (LEAVING, "mine.Brief: its module calls sys.exit() when it is imported"),
        (LEAVING_OBJECT, "reward.components.mine: mine.Brief() raised SystemExit: 0"),
    ],
)
def test_code_that_exits_before_the_run_is_refused(folder, code, said):
    (folder / "mine.py").write_text(code)
    refused = launch(*ONE_STEP, component("Brief"), "run_dir=run", cwd=folder)
    assert refused.returncode == 2
    assert said in refused.stderr.splitlines()[-1]
    assert not (folder / "run").exists()


MOVING = """
import os

ELSEWHERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "elsewhere")
os.chdir(ELSEWHERE)


class Moves:
    def __init__(self):
        os.chdir(ELSEWHERE)

    def __call__(self, completions, **columns):
        os.chdir(ELSEWHERE)
        return [0.0] * len(completions)


def centered(rewards, weights, valid):
    os.chdir("/")  # not restored
    total = (rewards * weights).sum(dim=-1)
    return total - total.mean(dim=1, keepdim=True)
"""


@pytest.mark.parametrize("more", [[], ["objective.advantage=mine.centered"]], ids=["rewards", "and advantage"])
def test_code_that_changes_the_working_directory_does_not_redirect_a_run(folder, more):
    """Nor into another run, which is at the same relative path in the other directory."""
    (folder / "mine.py").write_text(MOVING)
    other = folder / "elsewhere" / "run"
    other.mkdir(parents=True)
    (other / "status.json").write_text("{}")
    done = launch(*SHORT, "grpo.num_steps=2", component("Moves"), "run_dir=run", "eval.after=true", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    assert len(rows(run)) == 2
    assert status(run)["state"] == "finished"
    assert all((run / name).exists() for name in ("final_model", "report.html", "eval/after.json", "checkpoints"))
    assert sorted(path.name for path in (folder / "elsewhere").rglob("*")) == ["run", "status.json"]
    assert (other / "status.json").read_text() == "{}"
    if not more:
        assert "run folder run\n" in done.stdout  # a short path, as without a change


def test_the_progress_has_the_fields_of_transformers():
    config = typed(compose_config(["experiment=quickstart", "grpo.num_steps=7", "hardware=cpu"]))
    ours = vars(trainer_state(config, 160, 3))
    theirs = vars(TrainerState(global_step=3, max_steps=7, epoch=3 * 16 / 160))
    assert ours == theirs
