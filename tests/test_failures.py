"""Failures within a run, in real processes: memory, NaN, a second process, jobs of a sweep, reward functions."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from grpo.config.checks import typed
from grpo.config.migrations import load_frozen
from grpo.runs.checkpoint import latest_checkpoint, load_state, read_checkpoint
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_experiment
from grpo.training.trainer import Trainer
from tests.launches import (
    NO_FAULT,
    SHORT,
    assert_same_run,
    grpo,
    launch,
    resume,
    rows,
    start,
    status,
    wait_for_step,
)

SLOW = pytest.mark.slow  # rows of large tables, of which a plain test run takes only a sample
TRAINER = "grpo.training.trainer"
GROUPS = "grpo.training.groups"

# Out of memory.


CUT = ["hardware.rollout_tokens=400", "hardware.micro_batch_tokens=200", "grpo.num_steps=3", "checkpoint.every=1"]
CUT += ["checkpoint.keep_last=2", "preflight=false"]  # a budget halved in the pre-flight is restored after it


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run with enough memory. Tests only read it."""
    run_dir = tmp_path_factory.mktemp("cut") / "run"
    assert launch(*SHORT, *CUT, f"run_dir={run_dir}", cwd=run_dir.parent).returncode == 0
    return run_dir


@pytest.mark.parametrize(
    ("place", "call", "part"),
    [
        pytest.param("grpo.rollout.native._decode", "1x", "rollout", marks=SLOW),
        pytest.param(f"{TRAINER}.all_logps", "1x", "reference", marks=SLOW),
        pytest.param(f"{TRAINER}.accumulate_gradient", "1x", "update", marks=SLOW),
        ("torch.Tensor.backward", "2x", "update"),
    ],
    ids=["in sampling", "in the reference pass", "in forward", "in backward"],
)
def test_out_of_memory_halves_the_token_budget_and_a_resumed_run_keeps_it(tmp_path, cut_run, place, call, part):
    budget = 400 if part == "rollout" else 200
    run_dir = tmp_path / "run"
    failing = launch(*SHORT, *CUT, f"run_dir={run_dir}", cwd=tmp_path, fault=(place, call, "memory"))
    assert failing.returncode == 0, failing.stderr
    said = failing.stderr + failing.stdout
    assert f"out of memory in the {part} with {budget} tokens at a time; trying {budget // 2} from now on" in said
    assert said.count("out of memory") == 1
    assert load_state(run_dir / "checkpoints" / "step_000003").states == {part: {"from": budget, "to": budget // 2}}
    # Batches are split differently; problems and noise are the same, and the numbers are equal up to rounding.
    for ours, theirs in zip(rows(run_dir), rows(cut_run), strict=True):
        assert ours["digest/completions"] == theirs["digest/completions"]
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7)
    weights, uncut = (load_file(folder / "final_model" / "model.safetensors") for folder in (run_dir, cut_run))
    for name in weights:
        torch.testing.assert_close(weights[name], uncut[name], rtol=1e-4, atol=1e-6)

    more = ["resume=true", f"run_dir={run_dir}", "grpo.lr_schedule=linear", "grpo.num_steps=3"]
    (run_dir / "status.json").write_text(json.dumps(status(run_dir) | {"state": "interrupted"}))
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    never_again = ("grpo.model.oom.TokenBudget._halve", "1", "kill")
    assert part_tokens(run_dir, part) == budget // 2
    assert launch(*more, cwd=tmp_path, fault=never_again).returncode == 0
    assert load_state(run_dir / "checkpoints" / "step_000003").states == {part: {"from": budget, "to": budget // 2}}


@pytest.mark.slow
def test_out_of_memory_while_a_gradient_is_added_to_its_master_weight_adds_nothing_twice(tmp_path):
    """In bfloat16 each gradient is converted to float32, for which there may be no memory. The optimizer is SGD."""
    settings = [*SHORT, "grpo.num_steps=1", "hardware.compute_dtype=bfloat16", "optimizer.lr=1.0", "checkpoint.every=0"]
    settings += ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.fused", "grpo.warmup_steps=0"]
    weights = [load_file(MODEL_DIR / "model.safetensors")]
    for name, fault in (
        ("straight", NO_FAULT),
        ("failing", ("grpo.model.loading._pass_gradient_to_master", "7x", "memory")),
    ):
        run_dir = tmp_path / name
        done = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
        assert done.returncode == 0, done.stderr
        assert ("out of memory in the update" in done.stderr + done.stdout) == (name == "failing")
        weights.append(load_file(run_dir / "final_model" / "model.safetensors"))
    for name, before in weights[0].items():
        straight, failing = weights[1][name] - before, weights[2][name] - before
        assert straight.norm() > 0
        assert (failing - straight).norm() < 0.2 * straight.norm(), name  # split differently, so rounded differently


def part_tokens(run_dir, part):
    """How many tokens a run that is resumed from its newest checkpoint processes at once in this part."""
    trainer = Trainer(build_experiment(typed(load_frozen(run_dir / "config.yaml"))))
    trainer.load_state_dict(read_checkpoint(latest_checkpoint(run_dir / "checkpoints")))
    return trainer.state_dict()["trainer"].states[part]["to"]


def test_out_of_memory_with_one_completion_says_what_to_lower(tmp_path):
    fault = (f"{TRAINER}.accumulate_gradient", "1", "memory")
    failed = launch(*SHORT, "hardware.micro_batch_tokens=150", f"run_dir={tmp_path / 'run'}", cwd=tmp_path, fault=fault)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert "out of memory in the update with one completion at a time; lower grpo.max_completion_length" in last
    assert "with 150 tokens at a time; trying 75" in failed.stderr + failed.stdout


# NaN.


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_its_batch_is_saved(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SHORT, "grpo.num_steps=4", "checkpoint.every=1", "checkpoint.keep_last=9"]
    fault = ("grpo.algorithm.objective.Objective.__call__", "2x", "nan")
    run = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
    assert run.returncode == 0, run.stderr
    assert [row["loss"] is None for row in rows(run_dir)] == [False, True, False, False]
    assert "NaN" not in (run_dir / "metrics" / "metrics.jsonl").read_text()
    for name in ("model", "optimizer"):
        one, two, three = (
            (run_dir / "checkpoints" / f"step_00000{step}" / f"{name}.safetensors").read_bytes() for step in (1, 2, 3)
        )
        assert one == two != three
    batch = load_file(run_dir / "skipped" / "step_000002.safetensors")
    assert batch["completion_ids"].shape == (12, batch["completion_mask"].shape[1])
    samples = (run_dir / "skipped" / "step_000002.jsonl").read_text().splitlines()
    assert [json.loads(line)["advantage"] for line in samples] == pytest.approx(batch["advantages"].tolist())
    states = [load_state(run_dir / "checkpoints" / f"step_00000{step}").skipped_in_a_row for step in (1, 2, 3)]
    assert states == [0, 1, 0]


def test_after_too_many_skipped_steps_in_a_row_the_run_fails_with_an_intact_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    settings = [*SHORT, "grpo.num_steps=6", "checkpoint.every=1", "grpo.max_skipped_steps=2"]
    fault = ("grpo.algorithm.objective.Objective.__call__", "3", "nan")
    run = launch(*settings, f"run_dir={run_dir}", cwd=tmp_path, fault=fault)
    assert run.returncode == 1
    assert "loss or gradient was not finite in 3 steps in a row" in run.stderr.splitlines()[-1]
    assert status(run_dir)["state"] == "failed"
    kept = sorted(path.stem for path in (run_dir / "skipped").glob("*.jsonl"))
    assert kept == ["step_000003", "step_000004", "step_000005"]
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert load_state(checkpoint).step == 5
    assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())


# Two processes.


def test_a_second_process_on_a_run_folder_is_refused(tmp_path, straight):
    run_dir = tmp_path / "run"
    first = start(run_dir, fault=(f"{GROUPS}.group_keys", "2x", "sleep:60"))
    wait_for_step(run_dir, 1)
    second = resume(run_dir)
    assert second.returncode == 2
    assert f"{run_dir.name} is in use by another process" in second.stderr
    first.kill()
    first.wait()
    assert resume(run_dir).returncode == 0
    assert_same_run(run_dir, straight)


# Sweeps.

REWARDS = """
import gc
import hashlib
from pathlib import Path

from transformers import Qwen2ForCausalLM


def count_models(completions, **columns):
    alive = sum(isinstance(each, Qwen2ForCausalLM) for each in gc.get_objects())
    with open("models", "a") as file:
        file.write(f"{alive}\\n")
    return [0.0] * len(completions)


def fail_without_a_file(completions, **columns):
    if Path("fail").exists() and Path("fail").read_text() == str(sum(1 for _ in Path("sweep").glob("*/config.yaml"))):
        raise ValueError("as asked")
    return [0.0] * len(completions)


def leave(completions, how, **columns):
    raise {"exit": SystemExit(0), "interrupt": KeyboardInterrupt()}[how]


def hang(completions, **columns):
    while True:
        pass


def hang_in_c(completions, **columns):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.fixture
def my_rewards(tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_leaves_no_model_in_memory_and_is_run_again_on_resume(my_rewards):
    sweep = my_rewards / "sweep"
    command = [
        "-m",
        *SHORT,
        "hydra/launcher=basic",  # all jobs in one process
        "grpo.num_steps=2",
        "grpo.beta=0.01,0.02,0.04",
        "tracking=offline",
        "sweep_dir=sweep",
        "+reward.components.count={_target_: my_rewards.count_models, weight: 0, isolate: false}",
        "+reward.components.fail={_target_: my_rewards.fail_without_a_file, weight: 0}",
    ]
    (my_rewards / "fail").write_text("2")  # the second job
    failed = launch(*command, cwd=my_rewards)
    assert failed.returncode == 1
    jobs = sorted(path for path in sweep.iterdir() if path.is_dir())
    assert [status(job)["state"] for job in jobs] == ["finished", "failed", "finished"]
    assert "Traceback" not in failed.stdout + failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("failed: ")
    assert f"sweep/{jobs[1].name} failed: {status(jobs[1])['error']}" in failed.stdout + failed.stderr
    assert "Traceback" in (jobs[1] / "launch.log").read_text()
    alive = [int(line) for line in (my_rewards / "models").read_text().split()]
    assert set(alive) == {2}  # only its own policy and reference, also in the job after the failed one
    wandb_runs = [path for job in jobs for path in job.glob("wandb/offline-run-*")]
    assert len({path.name.rsplit("-", 1)[-1] for path in wandb_runs}) == len(jobs)
    finished = {job: (job / "metrics" / "metrics.jsonl").stat().st_mtime_ns for job in (jobs[0], jobs[2])}

    (my_rewards / "fail").unlink()
    again = launch(*command, "resume=true", cwd=my_rewards)
    assert again.returncode == 0, again.stderr
    assert [status(job)["state"] for job in jobs] == ["finished"] * 3
    assert sorted(path for path in sweep.iterdir() if path.is_dir()) == jobs
    assert {job: (job / "metrics" / "metrics.jsonl").stat().st_mtime_ns for job in finished} == finished
    assert [row["step"] for row in rows(jobs[1])] == [1, 2]


@pytest.mark.slow
def test_a_killed_sweep_resumes_where_it_stopped(tmp_path):
    command = ["-m", *SHORT, "hydra/launcher=basic", "grpo.num_steps=3", "grpo.beta=0.01,0.04", "checkpoint.every=1"]
    assert launch(*command, "sweep_dir=whole", cwd=tmp_path).returncode == 0
    fault = (f"{GROUPS}.group_keys", "5", "kill")  # the second step of the second job
    assert launch(*command, "sweep_dir=sweep", cwd=tmp_path, fault=fault).returncode == -9
    again = launch(*command, "sweep_dir=sweep", "resume=true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for job in (tmp_path / "whole").glob("[01]_*"):
        twin = tmp_path / "sweep" / job.name
        assert rows(twin) == rows(job)
        assert (twin / "final_model" / "model.safetensors").read_bytes() == (
            job / "final_model" / "model.safetensors"
        ).read_bytes()


def test_a_sweep_that_does_not_exist_cannot_be_resumed(tmp_path):
    refused = launch("-m", *SHORT, "grpo.beta=0.01,0.04", "resume=true", cwd=tmp_path)
    assert refused.returncode == 2
    assert "resume=true: no sweep with these overrides was found; give those of its first launch" in refused.stderr


# Reward functions that raise SystemExit or KeyboardInterrupt.


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "RewardError: reward component 'leave' raised SystemExit: 0"),
        ("interrupt", "RewardError: reward component 'leave' raised KeyboardInterrupt"),
        ("interrupt, isolate: false", "RuntimeError: KeyboardInterrupt() was raised by code of the run"),
    ],
)
def test_an_exit_without_a_signal_counts_as_a_failure(my_rewards, how, said):
    leaving = f"+reward.components.leave={{_target_: my_rewards.leave, how: {how}}}"
    failed = launch(*SHORT, "run_dir=run", leaving, cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"failed: {said}")
    assert status(my_rewards / "run")["state"] == "failed"
    assert "my_rewards.py" in (my_rewards / "run" / "launch.log").read_text()
    assert not (my_rewards / "run" / "checkpoints").exists()


def test_an_exit_in_a_command_counts_as_a_failure(my_rewards):
    leaving = "+reward.components.leave={_target_: my_rewards.leave, how: exit}"
    failed = grpo("evaluate", "experiment=quickstart", "eval.max_problems=2", leaving, cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(
        "failed: RewardError: reward component 'leave' raised SystemExit: 0"
    )


# Reward functions that hang.


def test_a_reward_function_that_hangs_fails_the_run_after_its_timeout_or_is_skipped(my_rewards):
    settings = [*SHORT, "grpo.num_steps=1", "reward.timeout_s=0.5"]
    settings += ["+reward.components.hang={_target_: my_rewards.hang}"]
    failed = launch(*settings, "run_dir=a", cwd=my_rewards)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "failed: RewardError: reward component 'hang' took longer than 0.5 s"
    skipped = launch(*settings, "run_dir=b", "reward.on_error=skip", cwd=my_rewards)
    assert skipped.returncode == 0, skipped.stderr
    said = skipped.stderr + skipped.stdout
    assert "reward component 'hang' took longer than 0.5 s; skipped for 12 completions" in said
    (row,) = rows(my_rewards / "b")
    assert row["rewards/hang/mean"] is None
    assert row["reward"] > 0


def test_a_reward_function_that_cannot_be_interrupted_ends_the_run_as_failed(my_rewards):
    hanging = "+reward.components.hang={_target_: my_rewards.hang_in_c, isolate: false}"
    failed = launch(*SHORT, "reward.timeout_s=0.5", "run_dir=run", hanging, cwd=my_rewards)
    assert failed.returncode == 1
    error = "RewardError: reward component 'hang' took longer than 0.5 s, and could not be ended"
    assert failed.stderr.splitlines()[-1] == f"failed: {error}"
    assert status(my_rewards / "run") == {**status(my_rewards / "run"), "state": "failed", "error": error}


# Memory.


@pytest.mark.slow
def test_resuming_needs_no_more_memory_than_training_did(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from grpo.tiny import MODEL_DIR

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config)  # 30 million parameters: copies of them outweigh the other memory of a step
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = [*SHORT, f"model.name={tmp_path / 'model'}", "grpo.batch_size=2", "grpo.num_generations=2"]
    settings += ["grpo.max_completion_length=8", "grpo.num_steps=3", "checkpoint.every=2"]
    run_dir = tmp_path / "run"
    assert launch(*settings, f"run_dir={run_dir}", cwd=tmp_path).returncode == 0
    stopped = tmp_path / "stopped"
    fault = (f"{GROUPS}.group_keys", "3", "kill")
    assert launch(*settings, f"run_dir={stopped}", cwd=tmp_path, fault=fault).returncode == -9
    assert resume(stopped).returncode == 0
    assert peaks(stopped)[2] < 1.02 * peaks(run_dir)[2]


def peaks(run_dir):
    lines = (run_dir / "metrics" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["perf/peak_memory_gb"] for line in lines]
