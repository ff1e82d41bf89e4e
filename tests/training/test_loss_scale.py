"""Tests of float16, in which the loss is scaled so that its gradient neither underflows nor overflows."""

import copy

import pytest
import torch

from grpo.algorithm.objective import Objective
from grpo.batch import Prompts
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.rollout.load_check import load_checked_model
from grpo.runs.checkpoint import load_state
from grpo.training.experiment import build_experiment
from grpo.training.trainer import Trainer
from grpo.training.update import Batch, LossScale, accumulate_gradient, apply_gradient
from tests.launches import SETTINGS, assert_same_run, launch, rows
from tests.tiny_model import plain_completions, tiny_config


@pytest.fixture
def trainer():
    """A function that creates the trainer of a run in float16 with float32 weights."""
    overrides = [*SETTINGS, "hardware.compute_dtype=float16", "grpo.lr_schedule=constant", "grpo.warmup_steps=0"]
    threads = torch.get_num_threads()
    yield lambda: Trainer(build_experiment(typed(compose_config(overrides))))
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_loss_scale_changes_neither_metrics_nor_updated_weights():
    model = load_checked_model(tiny_config(), torch.device("cpu"))
    ids = torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        Prompts(ids[:2, :5], torch.ones(2, 5, dtype=torch.long)),
        plain_completions(ids, torch.arange(4) // 2),
        torch.tensor([1.0, -1.0, 0.5, -0.5]),
    )
    numbers = {"beta": 0.0, "epsilon_low": 0.1, "epsilon_high": 0.1}
    objective = Objective(ratio="token", surrogate="clip", reduction="row", kl="k3", **numbers)
    results = []
    for scale in (1.0, 1024.0):
        scaled = copy.deepcopy(model)
        counts = batch.counts(max_length=9)
        metrics = accumulate_gradient(
            scaled, objective, batch, counts, temperature=1.0, token_budget=10**4, loss_scale=scale
        ).means()
        first = next(scaled.parameters()).grad.clone()
        optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
        norm, made = apply_gradient(scaled, optimizer, metrics["loss"], max_grad_norm=0.5, loss_scale=scale)
        assert made
        results.append((metrics, norm, first / scale, [p.detach() for p in scaled.parameters()]))
    (metrics, norm, grad, weights), (metrics_scaled, norm_scaled, grad_scaled, weights_scaled) = results
    assert (metrics, norm) == (metrics_scaled, pytest.approx(norm_scaled, rel=1e-6))
    assert torch.equal(grad, grad_scaled)  # scaling by a power of two is exact
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(weights, weights_scaled, strict=True))


def test_a_gradient_that_overflows_is_computed_again_with_half_the_scale(trainer):
    """The step gives the same result as if it had started with the right scale."""
    overflowing = trainer()
    overflowing.loss_scale = LossScale(2.0**40)
    row = overflowing.step(1).row
    assert 1 <= row["loss_scale"] < 2.0**40
    straight, start = trainer(), trainer().master
    straight.loss_scale = LossScale(row["loss_scale"])
    assert straight.step(1).row["grad_norm"] == row["grad_norm"]
    weights = zip(overflowing.master.parameters(), straight.master.parameters(), start.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in weights)


def test_a_gradient_that_no_scale_makes_finite_skips_the_step_and_halves_the_scale(trainer):
    skipping = trainer()
    next(skipping.policy.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    assert skipping.step(1).skipped is not None
    assert skipping.state_dict()["trainer"].loss_scale == {"value": 2.0**15, "updates": 0}


def test_the_scale_grows_after_many_updates():
    scale = LossScale(8.0)
    for _ in range(1999):
        scale.count_update()
    assert scale.value == 8.0
    scale.count_update()
    assert scale == LossScale(16.0, 0)


@pytest.mark.slow
def test_resume_in_float16_is_bitwise_equal(tmp_path):
    settings = [*SETTINGS, "hardware.compute_dtype=float16", "tuning=lora"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert launch(*settings, f"run_dir={straight}", cwd=tmp_path).returncode == 0
    fault = ("grpo.training.trainer.apply_gradient", "10", "kill")  # two updates per step: this is in step 5
    assert launch(*settings, f"run_dir={killed}", cwd=tmp_path, fault=fault).returncode != 0
    assert load_state(killed / "checkpoints" / "step_000004").loss_scale == {"value": 65536.0, "updates": 8}
    result = launch("resume=true", f"run_dir={killed}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_run(killed, straight)
    assert {row["loss_scale"] for row in rows(straight)} == {65536.0}
