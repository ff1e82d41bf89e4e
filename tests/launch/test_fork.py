"""fork=true: a new run from a checkpoint of another one."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from grpo.config.migrations import load_frozen
from tests.launches import SETTINGS, launch, rows, status

TWIN = [*SETTINGS, "checkpoint.every=2", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A run of `SETTINGS` with all of its checkpoints. Tests only read it."""
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    assert launch(*TWIN, f"run_dir={run_dir}", cwd=run_dir.parent).returncode == 0
    return run_dir


def fork(parent, cwd, *arguments, **options):
    result = launch("fork=true", f"run_dir={parent}", *arguments, cwd=cwd, **options)
    folders = sorted((cwd / "outputs" / "quickstart").glob("*"))
    return result, folders[-1] if folders else None


@pytest.mark.parametrize("step", [2, 6], ids=["first iteration", "second iteration"])
def test_a_fork_without_changes_is_its_parent_bit_for_bit(parent, tmp_path, step):
    result, run = fork(parent, tmp_path, f"fork_step={step}")
    assert result.returncode == 0, result.stderr
    assert rows(run) == rows(parent)
    for file in ("checkpoints/step_000008/model.safetensors", "checkpoints/reference_000002/model.safetensors"):
        assert (run / file).read_bytes() == (parent / file).read_bytes()
    assert status(run)["state"] == "finished"


def test_a_fork_with_another_learning_rate_starts_from_the_same_weights_and_noise(parent, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    result, run = fork(parent, tmp_path, "fork_step=4", "optimizer.lr=0.01", "tracking.tags=[forked]")
    assert result.returncode == 0, result.stderr
    ours, theirs = rows(run), rows(parent)
    assert ours[:4] == theirs[:4]
    assert ours[4]["digest/completions"] == theirs[4]["digest/completions"]
    assert ours[4]["learning_rate"] != theirs[4]["learning_rate"]
    assert ours[6]["digest/completions"] != theirs[6]["digest/completions"]
    config, parents = load_frozen(run / "config.yaml"), load_frozen(parent / "config.yaml")
    manifest = json.loads((parent / "checkpoints" / "step_000004" / "manifest.json").read_text())
    assert config.parent == {
        "run_dir": str(parent),
        "step": 4,
        "num_problems": 12,
        "weights_sha256": manifest["files"]["model.safetensors"]["sha256"],
        "parent": None,
    }
    assert (config.optimizer.lr, config.grpo) == (0.01, parents.grpo)
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


@pytest.mark.slow
def test_a_fork_killed_at_its_start_can_be_resumed_without_its_parent(parent, tmp_path):
    copy = shutil.copytree(parent, tmp_path / "copy")
    killed, run = fork(copy, tmp_path, "fork_step=4", fault=("grpo.training.groups.group_keys", "1", "kill"))
    assert killed.returncode == -9
    shutil.rmtree(copy)
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rows(run) == rows(parent)


@pytest.mark.slow
def test_a_sweep_of_forks_starts_every_job_from_the_checkpoint_of_the_parent(parent, tmp_path):
    sweep = ["-m", "fork=true", f"run_dir={parent}", "fork_step=6", "optimizer.lr=0.0002,0.01", "sweep_dir=sweep"]
    result = launch(*sweep, "hydra/launcher=basic", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    same, other = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert (same.name, other.name) == ("0_optimizer.lr_0.0002", "1_optimizer.lr_0.01")
    assert rows(same) == rows(parent)
    assert rows(other)[:6] == rows(parent)[:6]
    assert rows(other)[7] != rows(parent)[7]
    assert load_frozen(other / "config.yaml").tracking.group == "sweep"


def test_a_fork_with_another_beta_passes_it_to_the_objective(parent, tmp_path):
    result, run = fork(parent, tmp_path, "fork_step=6", "grpo.beta=0.5", "grpo.epsilon=0.2")
    assert result.returncode == 0, result.stderr
    config = load_frozen(run / "config.yaml")
    assert (config.objective.beta, config.grpo.beta, config.grpo.epsilon) == (None, 0.5, 0.2)
    assert rows(run)[6]["digest/completions"] == rows(parent)[6]["digest/completions"]
    assert rows(run)[6]["loss"] != rows(parent)[6]["loss"]


@pytest.mark.slow
def test_a_fork_can_add_a_kl_penalty_only_where_the_reference_model_is_known(tmp_path):
    run_dir = tmp_path / "run"
    assert launch(*TWIN, "grpo.beta=0", f"run_dir={run_dir}", cwd=tmp_path).returncode == 0
    refused, _ = fork(run_dir, tmp_path, "fork_step=6", "grpo.beta=0.04")
    assert refused.returncode == 2
    assert "the checkpoint has no reference of its iteration 2, since beta was 0" in refused.stderr
    killed, run = fork(
        run_dir,
        tmp_path,
        "fork_step=4",
        "grpo.beta=0.04",
        "checkpoint.every=1",
        "checkpoint.keep_last=1",
        fault=("grpo.training.groups.group_keys", "3", "kill"),
    )
    assert killed.returncode == -9
    assert launch("resume=true", f"run_dir={run}", cwd=tmp_path).returncode == 0
    assert rows(run)[4]["kl"] == pytest.approx(0, abs=1e-2)
    assert [row.get("kl") is None for row in rows(run)] == [True] * 4 + [False] * 4


def test_a_fork_that_lost_its_checkpoints_does_not_start_from_another_model(parent, tmp_path):
    _, run = fork(parent, tmp_path, "fork_step=4", fault=("grpo.training.groups.group_keys", "1", "kill"))
    shutil.rmtree(run / "checkpoints")
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    assert resumed.returncode == 1
    assert "so the checkpoint that the fork began from is lost; fork again" in resumed.stderr.splitlines()[-1]
    assert len(rows(run)) == 4


@pytest.mark.slow
def test_a_killed_sweep_of_forks_can_be_resumed(parent, tmp_path):
    sweep = ["-m", "fork=true", f"run_dir={parent}", "fork_step=6", "optimizer.lr=0.0002,0.01", "sweep_dir=sweep"]
    sweep.append("hydra/launcher=basic")
    killed = launch(*sweep, cwd=tmp_path, fault=("grpo.training.groups.group_keys", "2", "kill"))
    assert killed.returncode == -9
    again = launch(*sweep, "resume=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    same, other = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert rows(same) == rows(parent)
    launches = [json.loads(line) for line in (same / "launches.jsonl").read_text().splitlines()]
    assert [each["from_step"] for each in launches] == [6, 6]
    assert status(other)["state"] == "finished"
    # The parent's numbers of steps differ from the defaults, which must not count as a request for more steps.
    done = launch(*sweep[:-1], "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has finished already: nothing to do") == 2
    assert "job 1 of" not in done.stdout, "a process was started"
    # A job that lost its config.yaml is not restarted over its existing files.
    (other / "config.yaml").unlink()
    kept = rows(other)
    refused = launch(*sweep, "resume=true", cwd=tmp_path)
    assert (refused.returncode, rows(other)) == (1, kept)
    assert "has lost the config.yaml of its run; restore that" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_a_fork_with_another_optimizer_starts_it_with_a_new_state_and_is_resumed_bitwise(parent, tmp_path):
    arguments = ["fork_step=6", "optimizer=muon", "checkpoint.every=1", "checkpoint.keep_last=9"]
    result, run = fork(parent, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert "at step 6 into" in result.stdout
    assert result.stdout.count(", with a new optimizer state\n") == 1
    ours, theirs = rows(run), rows(parent)
    assert ours[:6] == theirs[:6]
    assert ours[6]["digest/completions"] == theirs[6]["digest/completions"]
    assert ours[6]["reward"] == theirs[6]["reward"]
    assert ours[7]["loss"] != theirs[7]["loss"]
    assert load_file(run / "checkpoints/step_000006/optimizer.safetensors") == {}
    weights = "checkpoints/step_000006/model.safetensors"
    assert (run / weights).read_bytes() == (parent / weights).read_bytes()
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)

    killed, run = fork(parent, tmp_path, *arguments, fault=("grpo.training.groups.group_keys", "1", "kill"))
    assert killed.returncode == -9
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert rows(run) == rows(tmp_path / "copy")
    for step in (7, 8):
        for name in ("model", "optimizer"):
            file = f"checkpoints/step_{step:06d}/{name}.safetensors"
            assert (run / file).read_bytes() == (tmp_path / "copy" / file).read_bytes()


def test_a_fork_with_another_optimizer_is_resumed_after_a_skipped_first_step(parent, tmp_path):
    fault = ("grpo.algorithm.objective.Objective.__call__", "1", "nan")
    arguments = ["fork_step=6", "optimizer=muon", "until_step=7", "checkpoint.every=1"]
    stopped, run = fork(parent, tmp_path, *arguments, fault=fault)
    assert stopped.returncode == 0, stopped.stderr
    assert rows(run)[-1]["loss"] is None
    assert load_file(run / "checkpoints/step_000007/optimizer.safetensors") == {}
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["step"] for row in rows(run)] == [*range(1, 9)]
    assert rows(run)[7]["loss"] is not None


@pytest.mark.slow
def test_a_fork_of_the_best_weights_is_exact_where_the_checkpoint_of_that_step_is_kept(tmp_path):
    evaluated = ["eval.every=6", "eval.max_problems=4", "checkpoint.keep_last=1", "until_step=7", "run_dir=parent"]
    assert launch(*TWIN, *evaluated, "checkpoint.keep_every=6", cwd=tmp_path).returncode == 0
    parent = tmp_path / "parent"
    assert json.loads((parent / "checkpoints/best/manifest.json").read_text())["reference"] == "reference_000002"
    exact, run = fork(parent, tmp_path, "checkpoint=best", "checkpoint.every=7")
    assert exact.returncode == 0, exact.stderr
    assert "new optimizer" not in exact.stdout
    assert load_frozen(run / "config.yaml").parent.step == 6
    assert rows(run)[:7] == rows(parent)
    file = "checkpoints/step_000007/model.safetensors"
    shutil.rmtree(parent / "checkpoints/step_000006")
    whole = (parent / file).read_bytes()

    forked, other = fork(parent, tmp_path, "checkpoint=best", "name=other", "checkpoint.keep_last=9")
    (other,) = (tmp_path / "outputs" / "other").iterdir()
    assert forked.returncode == 0, forked.stderr
    assert ", with a new optimizer state" in forked.stdout
    assert rows(other)[6]["digest/completions"] == rows(parent)[6]["digest/completions"]
    reference = "checkpoints/reference_000002/model.safetensors"
    assert (other / reference).read_bytes() == (parent / reference).read_bytes()
    assert status(other)["state"] == "finished"
    assert whole == (parent / file).read_bytes()


def test_a_fork_takes_all_keys_of_an_experiment_and_keeps_the_others(parent, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /tuning: full\n  - override /optimizer: adamw\nname: mine\n"
        "grpo:\n  epsilon: 0.1\n  max_completion_length: 7\nrollout:\n  temperature: 0.9\n"
    )
    flags = ["--config-dir", "conf", "experiment=mine", "grpo.beta=0.5"]
    result, run = fork(parent, tmp_path, "fork_step=6", *flags)
    assert result.returncode == 0, result.stderr
    ours, theirs = load_frozen(run / "config.yaml"), load_frozen(parent / "config.yaml")
    assert (ours.grpo.epsilon, ours.grpo.max_completion_length, ours.rollout.temperature) == (0.1, 7, 0.9)
    assert (ours.name, ours.grpo.beta) == ("quickstart", 0.5)
    assert ours.optimizer.lr != theirs.optimizer.lr  # the group is replaced
    assert (ours.data, ours.grpo.num_steps, ours.model) == (theirs.data, theirs.grpo.num_steps, theirs.model)


def test_a_fork_with_another_reward_takes_its_prompt_and_accuracy_too(parent, tmp_path):
    result, run = fork(parent, tmp_path, "fork_step=8", "reward=math_boxed", "grpo.num_iterations=3")
    assert result.returncode == 0, result.stderr
    config = load_frozen(run / "config.yaml")
    assert config.reward.components.correctness._target_ == "grpo.rewards.math_boxed.correctness"
    assert config.reward.components.keys() == {"correctness", "format"}
    assert config.eval.accuracy == {"_target_": "grpo.rewards.math_boxed.accuracy"}
    assert "boxed" in config.data.system_prompt
    assert config.data._target_ == load_frozen(parent / "config.yaml").data._target_
    back, last = fork(run, tmp_path, "reward=math_xml_strict", "grpo.num_iterations=4")
    assert back.returncode == 0, back.stderr
    config = load_frozen(last / "config.yaml")
    assert config.eval.accuracy._target_ == "grpo.rewards.math_xml.accuracy"
    assert (
        "reward=math_xml_strict: data.system_prompt stays; set it if the new reward is for" in back.stdout + back.stderr
    )


def test_a_fork_takes_the_keys_of_the_experiments_that_an_experiment_builds_on(parent, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for name, text in {
        "first": "grpo: {epsilon: 0.3, mu: 2}",
        "other": "rollout: {temperature: 0.8}",
        "second": "defaults: [first@_global_, /experiment/other, {override /tuning: full}, _self_]\ngrpo: {mu: 1}",
    }.items():
        (tmp_path / "conf" / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    result, run = fork(parent, tmp_path, "fork_step=6", "--config-dir", "conf", "experiment=second")
    assert result.returncode == 0, result.stderr
    ours = load_frozen(run / "config.yaml")
    assert (ours.grpo.epsilon, ours.grpo.mu, ours.rollout.temperature) == (0.3, 1, 0.8)


def test_a_fork_that_validates_on_other_problems_has_a_best_of_its_own(tmp_path):
    own = ["experiment=quickstart", "grpo.num_steps=1", "grpo.batch_size=2", "grpo.num_generations=2", "eval.every=1"]
    own += ["eval.before=false", "eval.after=false", "preflight=false", "tracking=disabled", "eval.max_problems=1"]
    own += ["checkpoint.keep_last=2"]
    first = launch(*own, "optimizer.lr=0", "run_dir=run", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    parent = tmp_path / "run" / "checkpoints" / "step_000001" / "trainer_state.json"
    best = json.loads(parent.read_text())["best_accuracy"]
    prompt = "data.system_prompt=Add."
    cases = (("same", 1, 40, []), ("other", 40, 40, []), ("shorter", 1, 30, []), ("asked", 1, 40, [prompt]))
    for name, problems, length, prompts in cases:
        more = [
            "fork=true",
            "run_dir=run",
            f"hydra.run.dir={name}",
            "grpo.num_steps=2",
            f"eval.max_problems={problems}",
            f"grpo.max_completion_length={length}",
            *prompts,
        ]
        done = launch(*more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        start, end = (
            json.loads((tmp_path / name / "checkpoints" / f"step_00000{step}" / "trainer_state.json").read_text())
            for step in (1, 2)
        )
        assert start["best_accuracy"] == (best if name == "same" else None)
        assert end["best_accuracy"] is not None
        evaluated = json.loads((tmp_path / name / "eval" / "step_000001.json").read_text())
        assert evaluated["n"] == problems  # by the fork itself where the parent's evaluation is not its own
        assert evaluated["max_completion_length"] == length
        of_parent = json.loads((tmp_path / "run" / "eval" / "step_000001.json").read_text())
        assert (evaluated == of_parent) == (name == "same")
        assert (tmp_path / name / "checkpoints" / "best").is_dir()
    assert json.loads(parent.read_text())["best_accuracy"] == best


def test_a_fork_keeps_the_validation_problems_of_its_parent(tmp_path):
    own = ["experiment=quickstart", "grpo.num_steps=1", "grpo.batch_size=2", "grpo.num_generations=2"]
    own += ["eval.before=false", "eval.after=false", "preflight=false", "tracking=disabled", "run_dir=run"]
    first = launch(*own, "data.validation_share=0", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = ["fork=true", "run_dir=run", "hydra.run.dir=fork", "grpo.num_steps=2"]
    refused = launch(*run, "data.validation_share=0.1", cwd=tmp_path)
    assert refused.returncode == 2
    assert "the parent was trained with 0.0 on the same data" in refused.stderr
    refused = launch(*run, "data=arithmetic", "data.validation_share=0.2", cwd=tmp_path)
    assert refused.returncode == 2
    done = launch(*run, "data=arithmetic", cwd=tmp_path)  # whose share is 0.1
    assert done.returncode == 0, done.stderr
    assert load_frozen(tmp_path / "fork" / "config.yaml").data.validation_share == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fork=true"], "fork=true needs the run to start from: run_dir=outputs/..."),
        (["fork=true", "run_dir=nowhere"], "fork=true: nowhere is not a run folder"),
        (["fork=true", "run_dir=PARENT", "checkpoint=5"], "keeps no checkpoint of that step, but of: 2, 4, 6, 8"),
        (
            ["fork=true", "run_dir=PARENT", "checkpoint=best"],
            "keeps no checkpoint of best accuracy, but of: 2",
        ),
        (["fork=true", "run_dir=PARENT", "fork_step=x"], "fork_step=x: give best or a step; "),
        (["experiment=quickstart", "checkpoint=best"], "checkpoint=best is for fork=true; to set when checkpoints are"),
        (
            ["fork=true", "run_dir=PARENT", "fork_step=4", "tuning=lora"],
            "start a new run with tuning=lora model.name=PARENT/final_model",
        ),
        (
            ["fork=true", "run_dir=PARENT", "fork_step=4", "experiment=smollm2_gsm8k"],
            "a fork continues with the weights of its parent's model, tiny; start a new run for another one",
        ),
        (["fork=true", "run_dir=PARENT", "fork_step=4", "experiment=none"], "there is no experiment=none"),
        (["fork=true", "run_dir=PARENT", "resume=true"], "fork=true starts a new run: leave resume out"),
        (["fork=true", "run_dir=PARENT", "fork_step=5"], "keeps no checkpoint of that step, but of: 2, 4, 6, 8"),
        (["fork=true", "run_dir=PARENT"], "the fork would start at step 8 of 8: nothing is left to do"),
        (["fork=true", "run_dir=PARENT", "fork_step=6", "grpo.num_steps=8"], "keep grpo.num_steps"),
        (["fork=true", "run_dir=PARENT", "fork_step=6", "grpo.num_generations=1"], "must be 2 or more"),
        (["fork=true", "run_dir=PARENT", "fork_step=6", "data.max_prompt_length=3"], "prompts are longer"),
    ],
)
def test_an_impossible_fork_is_refused_and_leaves_no_run(parent, tmp_path, arguments, said):
    result = launch(*(argument.replace("PARENT", str(parent)) for argument in arguments), cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert said.replace("PARENT", str(parent)) in result.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.name in ("config.yaml", "checkpoints")]
