"""Extensions by a user: each is one file of tests/outside and one line of config, without a change in grpo/."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.runs.checkpoint import load_state
from grpo.training.experiment import build_experiment
from grpo.training.trainer import Trainer
from tests.launches import ROOT, grpo, launch, rows

OUTSIDE = ROOT / "tests" / "outside"
SHORT = [
    "experiment=quickstart",
    "grpo.num_steps=2",
    "grpo.batch_size=2",
    "grpo.num_generations=4",
    "grpo.mu=2",
    "grpo.beta=0",
    "samples.every=1",
    "eval.before=false",
    "eval.after=false",
    "preflight=false",
    "tracking=disabled",
]


@pytest.fixture
def folder(tmp_path):
    """The folder of a user, which contains only the files that a test puts there."""
    here = tmp_path / "user"
    here.mkdir()
    return here


def run_with(folder: Path, name: str, line: str, *more: str) -> Path:
    """A run with one file of tests/outside and one line of config; it also writes its report. Returns its folder."""
    shutil.copy(OUTSIDE / f"{name}.py", folder)
    done = launch(*SHORT, line, *more, "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "report.html").exists()
    return folder / "run"


def test_an_objective_of_the_user(folder):
    run = run_with(folder, "toy_objective", "objective._target_=toy_objective.reinforce", "+objective.scale=2.0")
    single = launch(*SHORT, "objective._target_=toy_objective.reinforce", "run_dir=single", cwd=folder)
    assert single.returncode == 0, single.stderr
    ours, theirs = rows(run), rows(folder / "single")
    assert "clip_ratio/low_mean" not in ours[0]
    # Two updates on the same completions. The losses differ only by the scale, on which Adam's steps do not depend.
    assert ours[0]["digest/completions"] == theirs[0]["digest/completions"]
    assert ours[0]["loss"] == pytest.approx(2 * theirs[0]["loss"], rel=1e-3)
    assert ours[0]["toy/mean_logp"] == pytest.approx(theirs[0]["toy/mean_logp"], rel=1e-3)
    assert ours[0]["toy/mean_logp"] < 0


def test_a_surrogate_of_the_user(folder):
    """With a clip range that no ratio leaves, PPO's surrogate equals the surrogate without clipping."""
    run = run_with(folder, "toy_surrogate", "objective.surrogate=toy_surrogate.unclipped")
    wide = launch(*SHORT, "grpo.epsilon=0.999", "run_dir=wide", cwd=folder)
    assert wide.returncode == 0, wide.stderr
    ours, theirs = rows(run), rows(folder / "wide")
    assert 0 < ours[0]["toy/ratio_above_1"] < 1  # in the second of two updates
    assert theirs[0]["clip_ratio/region_mean"] == 0
    assert ours[0]["loss"] == theirs[0]["loss"]
    assert ours[1]["digest/completions"] == theirs[1]["digest/completions"]
    weights = (load_file(each / "final_model" / "model.safetensors") for each in (run, folder / "wide"))
    for one, other in zip(*(tensors.values() for tensors in weights), strict=True):
        assert torch.equal(one, other)


def test_an_advantage_function_of_the_user(folder):
    run = run_with(folder, "toy_advantage", "objective.advantage=toy_advantage.centered")
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert len({sample["reward"] for sample in samples}) > 1
    for group in (samples[:4], samples[4:]):
        mean = sum(sample["reward"] for sample in group) / 4
        for sample in group:
            assert sample["advantage"] == pytest.approx(sample["reward"] - mean, abs=1e-6)


def test_an_advantage_function_that_returns_a_wrong_shape_is_reported_by_name(folder):
    (folder / "wrong.py").write_text("def total(rewards, weights, valid):\n    return rewards.sum()\n")
    failed = launch(*SHORT, "objective.advantage=wrong.total", "run_dir=run", cwd=folder)
    assert failed.returncode == 1
    assert "objective.advantage=wrong.total returned the shape (); it must be (2, 4), or have the" in failed.stderr


def test_a_reward_class_of_the_user(folder):
    line = "+reward.components.brief={_target_: toy_reward.Brevity, limit: 40, weight: 0.5}"
    run = run_with(folder, "toy_reward", line)
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["rewards/brief"] == float(len(sample["completion"]) <= 40)
        others = sample["rewards/correctness"] + sample["rewards/format"]
        assert sample["reward"] == pytest.approx(others + 0.5 * sample["rewards/brief"])


def test_a_data_set_of_the_user(folder):
    run = run_with(folder, "toy_data", "data._target_=toy_data.load", "eval.after=true")
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert all(" - " in sample["prompt"] for sample in samples)
    after = json.loads((run / "eval" / "after.json").read_text())
    assert [len(after["problems"]), after["n"]] == [10, 10]


def test_a_rollout_engine_of_the_user_with_a_state_that_a_resumed_run_continues(folder):
    line = "rollout._target_=toy_engine.Prepared"
    run = run_with(folder, "toy_engine", line, "grpo.lr_schedule=constant")
    for row in rows(run):
        assert row["rewards/format/mean"] == pytest.approx(0.2)  # two of four tags, in every other completion
        assert "sampling/logp_difference/mean" not in row  # it returns no log-probabilities
    samples = [json.loads(line) for line in (run / "samples" / "step_000002.jsonl").read_text().splitlines()]
    assert [sample["completion"] for sample in samples[:2]] == ["<answer>\n1\n</answer>\n", "no answer"]
    assert load_state(run / "checkpoints" / "step_000002").states == {"rollout": {"calls": 2}}

    longer = launch("resume=true", "run_dir=run", line, "grpo.num_steps=3", cwd=folder)
    assert longer.returncode == 0, longer.stderr
    assert load_state(run / "checkpoints" / "step_000003").states == {"rollout": {"calls": 3}}


def test_an_optimizer_of_the_user_is_called_through_at_most_six_functions(folder):
    """There are at most six functions from `train` to the optimizer, so that a reader can follow the calls."""
    run_with(folder, "toy_optimizer", "optimizer._target_=toy_optimizer.Traced")
    callers = (folder / "callers.txt").read_text().split()
    assert callers == ["train", "steps", "step", "_update_policy", "_update_once", "apply_gradient"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("objective.advantage=toy_reward.Brevity", "objective.advantage=toy_reward.Brevity: must be a function, not a"),
        ("objective.surrogate=no_such.file", "objective.surrogate=no_such.file: No module named 'no_such'"),
        ("objective.surrogate=clipped", "objective.surrogate=clipped: must be clip or cispo or sapo, or the dotted"),
        (
            "objective.surrogate=toy_advantage.centered",
            "objective.surrogate=toy_advantage.centered: it must have the form f(ratio, logps, advantages, numbers):",
        ),
        (
            "objective.advantage=toy_surrogate.unclipped",
            "objective.advantage=toy_surrogate.unclipped: it must have the form f(rewards, weights, valid): missing",
        ),
        (
            "objective._target_=toy_advantage.centered",
            "it must have the form f(inputs: LossInputs, counts: Counts, **numbers)",
        ),
        ("rollout._target_=toy_reward.Brevity", "rollout._target_=toy_reward.Brevity: "),
        ("objective._target_=torch.add", "objective._target_=torch.add: no signature found"),
        (
            "rollout._target_=builtins.dict",
            "rollout._target_=builtins.dict: it must be a class of the form RolloutEngine",
        ),
        ("objective.ratio=[a]", "objective.ratio=['a']: must be token or sequence, or the dotted path of"),
        ("optimizer.lr=[1]", "optimizer.lr=[1]: must be a number"),
        ("rollout.temperature={a: 1}", "rollout.temperature={'a': 1}: must be a number"),
    ],
)
def test_an_extension_that_does_not_fit_is_refused_and_leaves_no_files(folder, line, said):
    for file in OUTSIDE.glob("*.py"):
        shutil.copy(file, folder)
    before = sorted(folder.iterdir())
    refused = launch(*SHORT, line, "run_dir=run", cwd=folder)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.slow
def test_a_fork_may_use_another_engine_than_the_one_whose_state_was_saved(folder):
    run_with(folder, "toy_engine", "rollout._target_=toy_engine.Prepared")
    fork = ["fork=true", "run_dir=run", "grpo.num_steps=3", "rollout._target_=grpo.rollout.native.NativeEngine"]
    done = launch(*fork, cwd=folder)
    assert done.returncode == 0, done.stderr
    (forked,) = folder.glob("outputs/quickstart/*")
    assert "sampling/logp_difference/mean" in rows(forked)[2]


CLOSING = """
import toy_engine


class Closing(toy_engine.Prepared):
    def close(self):
        with open("closed.txt", "a") as file:
            file.write("closed ")


class Interleaved(toy_engine.Prepared):
    def generate(self, prompts, sampling, *, group_size, keys):
        completions = super().generate(prompts, sampling, group_size=group_size, keys=keys)
        return completions.select(completions.group.argsort(stable=True).view(-1, group_size).T.flatten())
"""


def test_an_engine_is_closed_at_the_end_of_each_command_and_after_a_refusal(folder):
    (folder / "mine.py").write_text(CLOSING)
    line = "rollout._target_=mine.Closing"
    run = run_with(folder, "toy_engine", line, "grpo.lr_schedule=constant")
    status = (run / "status.json").read_text()
    refused = launch("resume=true", "run_dir=run", "grpo.num_steps=3", "until_step=1", line, cwd=folder)
    assert refused.returncode == 2
    assert "until_step=1: the run is at step 2 already" in refused.stderr
    assert (run / "status.json").read_text() == status  # still a finished run
    assert not list(run.glob("resumes/*"))
    assert grpo("evaluate", "run_dir=run", line, "eval.max_problems=4", cwd=folder).returncode == 0
    assert grpo("verify", "run_dir=run", line, cwd=folder).returncode == 0
    assert (folder / "closed.txt").read_text().split() == ["closed"] * 4


def test_an_engine_that_returns_completions_in_another_order_ends_the_run(folder):
    shutil.copy(OUTSIDE / "toy_engine.py", folder)
    (folder / "mine.py").write_text(CLOSING)
    failed = launch(*SHORT, "rollout._target_=mine.Interleaved", "run_dir=run", cwd=folder)
    assert failed.returncode == 1
    said = (
        "Interleaved.generate() returned wrong completions: group must be (0, 0, ..., 1, 1, ...), each number 4 times"
    )
    assert said in failed.stderr


def test_a_model_cannot_be_evaluated_without_held_out_problems(folder):
    code = "import toy_data\nfrom grpo.data.problems import Problems\n\n\ndef load(**settings):\n"
    (folder / "mine.py").write_text(code + "    return Problems(toy_data.load().train, [])\n")
    shutil.copy(OUTSIDE / "toy_data.py", folder)
    off = ["eval.before=false", "eval.after=false", "eval.every=0"]
    refused = grpo("evaluate", "model=tiny", "data=arithmetic", "data._target_=mine.load", *off, cwd=folder)
    assert refused.returncode == 2
    assert "error: data has no test problems to evaluate on" in refused.stderr


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_run_fails_with_the_name_of_the_engine_if_the_engine_state_cannot_be_saved(folder, overlap):
    code = "import torch\nimport toy_engine\n\n\nclass Tensors(toy_engine.Prepared):\n    def state_dict(self):\n"
    (folder / "tensors.py").write_text(code + "        return {'calls': torch.ones(1)}\n")
    shutil.copy(OUTSIDE / "toy_engine.py", folder)
    options = ["checkpoint.every=1", f"checkpoint.overlap={overlap}", "rollout._target_=tensors.Tensors"]
    failed = launch(*SHORT, *options, "run_dir=run", cwd=folder)
    assert failed.returncode == 1
    assert "rollout._target_=tensors.Tensors: its state_dict() must hold JSON values" in failed.stderr


def test_the_documentation_shows_these_files_unchanged():
    page = (ROOT / "docs" / "extending.md").read_text()
    shown = [file for file in sorted(OUTSIDE.glob("*.py")) if file.name in page]
    assert len(shown) >= 6
    for file in shown:
        assert file.read_text().strip() in page, f"{file.name} in docs/extending.md is another one"


def test_the_saved_state_of_an_engine_is_that_after_the_last_completed_step_or_evaluation(folder, monkeypatch):
    """An aborted step is not saved, since a resumed run repeats it; neither is an evaluation before step 1."""
    shutil.copy(OUTSIDE / "toy_engine.py", folder)
    monkeypatch.syspath_prepend(folder)
    threads = torch.get_num_threads()
    line = "rollout._target_=toy_engine.Prepared"
    trainer = Trainer(build_experiment(typed(compose_config([*SHORT, line, "eval.max_problems=4"]))))
    try:
        trainer.preflight()
        trainer.evaluate("test")
        assert trainer.engine.calls == 0  # a run that is resumed before its first checkpoint does not repeat these
        trainer.step(1)
        trainer.engine.calls += 5  # as a step would do that a stop signal aborts
        assert trainer.state_dict()["trainer"].states == {"rollout": {"calls": 1}}
        trainer.step(2)
        trainer.evaluate("test")
        assert trainer.state_dict()["trainer"].states == {"rollout": {"calls": 8}}
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def test_a_run_folder_that_names_an_untrusted_choice_of_the_objective_is_refused(folder):
    run = run_with(folder, "toy_surrogate", "objective.surrogate=toy_surrogate.unclipped", "grpo.lr_schedule=constant")
    refused = launch("resume=true", f"run_dir={run}", "grpo.num_steps=4", cwd=folder)
    assert refused.returncode == 2
    assert "asks to run toy_surrogate.unclipped (objective.surrogate)" in refused.stderr
    assert "if you trust it, add: objective.surrogate=toy_surrogate.unclipped" in refused.stderr
    again = ["resume=true", f"run_dir={run}", "grpo.num_steps=4", "objective.surrogate=toy_surrogate.unclipped"]
    assert launch(*again, cwd=folder).returncode == 0
