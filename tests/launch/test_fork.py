"""fork=true: a new run from a checkpoint of another one."""

import json
import shutil

import pytest

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


def test_a_fork_killed_at_its_start_can_be_resumed_without_its_parent(parent, tmp_path):
    copy = shutil.copytree(parent, tmp_path / "copy")
    killed, run = fork(copy, tmp_path, "fork_step=4", fault=("grpo.training.trainer.group_keys", "1", "kill"))
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
        fault=("grpo.training.trainer.group_keys", "3", "kill"),
    )
    assert killed.returncode == -9
    assert launch("resume=true", f"run_dir={run}", cwd=tmp_path).returncode == 0
    assert rows(run)[4]["kl"] == pytest.approx(0, abs=1e-2)
    assert [row.get("kl") is None for row in rows(run)] == [True] * 4 + [False] * 4


def test_a_fork_that_lost_its_checkpoints_does_not_start_from_another_model(parent, tmp_path):
    _, run = fork(parent, tmp_path, "fork_step=4", fault=("grpo.training.trainer.group_keys", "1", "kill"))
    shutil.rmtree(run / "checkpoints")
    resumed = launch("resume=true", f"run_dir={run}", cwd=tmp_path)
    assert resumed.returncode == 1
    assert "so the checkpoint that the fork began from is lost; fork again" in resumed.stderr.splitlines()[-1]
    assert len(rows(run)) == 4


@pytest.mark.slow
def test_a_killed_sweep_of_forks_can_be_resumed(parent, tmp_path):
    sweep = ["-m", "fork=true", f"run_dir={parent}", "fork_step=6", "optimizer.lr=0.0002,0.01", "sweep_dir=sweep"]
    sweep.append("hydra/launcher=basic")
    killed = launch(*sweep, cwd=tmp_path, fault=("grpo.training.trainer.group_keys", "2", "kill"))
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fork=true"], "fork=true needs the run to start from: run_dir=outputs/..."),
        (["fork=true", "run_dir=nowhere"], "fork=true: nowhere is not a run folder"),
        (
            ["fork=true", "run_dir=PARENT", "fork_step=4", "optimizer=muon"],
            "MuonWithAdamW: the checkpoint holds the states of torch.optim.AdamW; keep that, or start a new run with",
        ),
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
    assert said in result.stderr.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.name in ("config.yaml", "checkpoints")]
