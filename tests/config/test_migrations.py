"""Run folders written by earlier versions can be resumed, evaluated, verified, forked and reported.

old_runs/ has a folder for each earlier version, beginning with version 0, which has no version key. Each contains four
runs of the embedded model that this version wrote; two of them were stopped after step 2 of 4.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from grpo.config.checks import typed
from grpo.config.errors import ConfigError
from grpo.config.migrations import VERSION, config_0_to_1, config_1_to_2, load_frozen, metrics_row, state_1_to_2
from grpo.config.overrides import Overrides
from grpo.runs.environment import environment
from grpo.runs.folder import RunFolder
from grpo.runs.sweep_folder import SweepFolder
from tests.launches import grpo, launch, rows

OLD = Path(__file__).resolve().parent / "old_runs"
VERSIONS = range(VERSION)
KINDS = ("full", "lora")
each_version = pytest.mark.parametrize("version", VERSIONS)


def old_run(version, name):
    return OLD / f"version_{version}" / name


@pytest.fixture
def old(tmp_path):
    """A copy of one of the old runs: `old(0, "full_finished")`."""

    def copied(version, name):
        return shutil.copytree(old_run(version, name), tmp_path / name)

    return copied


def written_here(run_dir):
    """Whether a run was written on the same processor with the same libraries, so that its bytes can be reproduced."""
    return RunFolder(run_dir).launches()[0]["environment"].items() <= environment(torch.device("cpu")).items()


def with_present_names(run_dir):
    """The rows without what rows of earlier versions lack, and `reward_std`, which has another meaning there."""
    present = [metrics_row(row) for row in rows(run_dir)]
    return [{name: row[name] for name in row.keys() - {"reward_std", "weights_changed"}} for row in present]


def tensors(run_dir):
    files = [*run_dir.glob("checkpoints/step_000004/*.safetensors"), *run_dir.glob("final_model/*.safetensors")]
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


@each_version
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_is_resumed_and_equals_the_run_that_was_never_stopped(old, kind, version):
    run = old(version, f"{kind}_interrupted")
    straight = old_run(version, f"{kind}_finished")
    done = launch("resume=true", f"run_dir={run}", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert RunFolder(run).finished()
    assert json.loads((run / "summary.json").read_text())["accuracy_difference"]["n"] > 0
    if written_here(straight):
        assert with_present_names(run) == with_present_names(straight)
        assert tensors(run) == tensors(straight)
        for step in range(1, 5):
            name = f"samples/step_{step:06d}.jsonl"
            assert (run / name).read_text() == (straight / name).read_text()
    else:
        assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(straight)], abs=0.05)
        assert tensors(run).keys() == tensors(straight).keys()
        pytest.skip("bytes are not compared: this processor, or these libraries, are not those that wrote the run")


@pytest.mark.parametrize(("kind", "version"), [("full", 0), ("lora", 1)])
def test_an_old_run_is_evaluated_verified_and_reported(old, kind, version):
    run = old(version, f"{kind}_finished")
    own = f"baseline={run}/eval/before.json"
    grader = "++eval.graders.lenient._target_=grpo.rewards.lenient.lenient"  # as docs/evaluation.md says
    evaluated = grpo("evaluate", f"run_dir={run}", grader, own, cwd=run.parent)
    assert evaluated.returncode == 0, evaluated.stderr
    (result,) = run.glob("eval/evaluate_*.json")
    now, then = json.loads(result.read_text()), json.loads((run / "eval" / "after.json").read_text())
    assert now["baseline"]["n"] == now["n"]
    assert now["graded"]["lenient"]["accuracy"] >= now["accuracy"]
    verified = grpo("verify", f"run_dir={run}", cwd=run.parent)
    assert "checksums: 1 of 1 checkpoint folders are intact" in verified.stdout, verified.stderr
    if written_here(run):
        assert now["accuracy"] == then["accuracy"]
        assert "equal: steps 1 to 4: every completion and metric" in verified.stdout
    reported = grpo("report", f"run_dir={run}", cwd=run.parent)
    assert reported.returncode == 0, reported.stderr
    assert "num_steps: 4" in (run / "report.html").read_text()


@each_version
def test_an_old_run_is_forked_with_another_objective(old, version):
    parent = old(version, "full_interrupted")
    fork = ["fork=true", f"run_dir={parent}", "objective=grpo", "objective.epsilon_low=0.3", "grpo.beta=0.02"]
    done = launch(*fork, cwd=parent.parent)
    assert done.returncode == 0, done.stderr
    (run,) = parent.parent.glob("outputs/quickstart/*")
    config = load_frozen(run / "config.yaml")
    assert (config.objective.beta, config.objective.epsilon_low, config.grpo.beta) == (None, 0.3, 0.02)
    assert config.parent.step == 2
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert rows(run)[:2] == rows(parent)


def test_an_old_run_whose_checkpoints_are_lost_is_not_started_again(old):
    run = old(0, "full_interrupted")
    shutil.rmtree(run / "checkpoints")
    kept = rows(run)
    status = (run / "status.json").read_text()
    refused = launch("resume=true", f"run_dir={run}", cwd=run.parent)
    assert (refused.returncode, rows(run)) == (2, kept)
    now = json.loads((run / "status.json").read_text())
    assert now == json.loads(status) | {"error": None}
    assert "has no checkpoint, but the run has saved one at step 2; restore its checkpoints" in refused.stderr


def test_a_run_with_a_gap_in_its_metrics_is_not_forked(old):
    parent = old(0, "full_interrupted")
    file = parent / "metrics" / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    refused = launch("fork=true", f"run_dir={parent}", cwd=parent.parent)
    assert refused.returncode == 2
    assert f"{file} does not have one row for each of the 2 steps" in refused.stderr
    assert [each.name for each in parent.parent.iterdir()] == [parent.name]


# Migration of a config.yaml of another version.


def frozen(**changes):
    values = yaml.safe_load((old_run(0, "full_finished") / "config.yaml").read_text())
    return values | changes


def test_migration_drops_keys_of_one_launch_and_fills_in_keys_that_were_added_later():
    values = frozen(run_dir="r", until_step=3, resume="auto")
    del values["grpo"]["max_skipped_steps"], values["reward"]["on_error"]
    values["hardware"]["card"] = None
    new = config_0_to_1(values)
    assert not {"run_dir", "until_step", "resume", "fork", "sweep", "plan"} & new.keys()
    assert (new["grpo"]["max_skipped_steps"], new["reward"]["on_error"]) == (3, "fail")
    assert new["hardware"]["card"] == {"memory_gb": None, "tflops": None, "bandwidth_gb_s": None}
    assert values["run_dir"] == "r"  # the argument is not changed


def test_a_migrated_objective_follows_grpo_where_the_values_were_equal_and_else_keeps_its_own():
    values = frozen()
    values["objective"]["epsilon"] = 0.25
    objective = config_0_to_1(values)["objective"]
    assert (objective["beta"], objective["epsilon"]) == (None, 0.25)
    assert values["objective"]["beta"] is not None  # the argument is not changed


def test_the_objective_of_version_1_is_migrated_to_choices_that_compute_the_same():
    values = config_0_to_1(frozen())
    values["objective"]["epsilon"] = 0.25
    objective = config_1_to_2(values)["objective"]
    assert (objective["beta"], objective["epsilon_low"], objective["epsilon_high"]) == (None, 0.25, 0.25)
    assert "epsilon" not in objective
    assert values["objective"]["epsilon"] == 0.25  # the argument is not changed


def test_the_rows_of_an_old_evaluation_are_read_with_the_keys_of_samples():
    run = RunFolder(old_run(0, "full_finished"))
    (row, *_) = json.loads((run.path / "eval" / "after.json").read_text())["problems"]
    (now, *_) = run.evaluation("after")["problems"]
    assert (now["problem_id"], now["completion"], now["correct"]) == (row["id"], row["completion"], row["correct"])
    assert {name: now[f"rewards/{name}"] for name in row["rewards"]} == row["rewards"]
    assert not {"id", "rewards"} & now.keys()


def test_both_forms_of_a_trainer_state_of_version_1_are_read():
    reduced = {"update": {"from": 200, "to": 100}}
    native = "grpo.rollout.native.NativeEngine"
    assert state_1_to_2({"step": 2, "reduced": reduced}) == {"step": 2, "states": reduced, "engine": native}
    later = {"step": 2, "parts": {"rollout": {"calls": 3}}, "engine": "mine.Engine"}
    assert state_1_to_2(later) == {"step": 2, "states": {"rollout": {"calls": 3}}, "engine": "mine.Engine"}


def test_an_old_sweep_by_optuna_is_read_as_one_by_tpe(tmp_path):
    record = {"overrides": ["seed=1,2"], "state": "interrupted", "sweeper": "optuna"}
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    assert SweepFolder(tmp_path).record() == record | {"sweeper": "tpe"}
    SweepFolder(tmp_path).begin(Overrides(["seed=1,2"]), ["seed"], None)
    assert json.loads((tmp_path / "sweep.json").read_text())["version"] == VERSION
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"version": VERSION + 1}))
    with pytest.raises(ConfigError, match=f"sweep.json is of version {VERSION + 1}"):
        SweepFolder(tmp_path).record()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"version": VERSION + 1},
            rf"is of version {VERSION + 1}, and this grpo knows versions up to {VERSION}: install",
        ),
        ({"version": "new"}, "is of version new"),
        ({"colour": "red"}, "has a key that this version does not know, colour: remove it if it has no effect"),
        ({"version": VERSION, "colour": "red"}, "has a key that this version does not know, colour"),
        ({"samples": {}}, r"lacks samples\.every: add it with the value that the run was started with"),
        ({"grpo": None}, r"lacks grpo\.num_iterations"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_one_line(tmp_path, change, said):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(frozen(**change)))
    with pytest.raises(ConfigError, match=said) as refused:
        load_frozen(file)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\0"])
def test_a_file_that_is_not_a_config_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_frozen(file)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


def test_a_folder_of_a_newer_version_is_refused_and_left_unchanged(old):
    run = old(0, "full_interrupted")
    (run / "config.yaml").write_text(f"version: {VERSION + 1}\n" + (run / "config.yaml").read_text())
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    refused = launch("resume=true", f"run_dir={run}", cwd=run.parent)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {run.name}/config.yaml is of version {VERSION + 1}"), line
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert before == after


def test_a_removed_key_in_the_changes_of_a_resume_is_ignored(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old_run(1, "full_finished"), run)
    (run / "changes.yaml").write_text("hardware.cuda_graphs: true\nhardware.threads: 3\n")
    hardware = typed(RunFolder(run).frozen_config()).hardware
    assert hardware.threads == 3
    assert not hasattr(hardware, "cuda_graphs")
