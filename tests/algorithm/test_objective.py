"""Tests of the objective against values computed by hand; test_trl_parity.py compares it with TRL."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from grpo.algorithm.objective import (
    CHOICES,
    Counts,
    LossInputs,
    Numbers,
    Objective,
    check_choices,
    cispo,
    clip,
    k1,
    k2,
    k3,
    log_ratio,
    sampling_weight,
    sapo,
    sequence_ratio,
)
from grpo.config.errors import ConfigError
from grpo.config.schema import FUNCTION_KEYS


def numbers(**changes):
    """The numbers of a surrogate."""
    given = {"epsilon_low": 0.1, "epsilon_high": 0.1, "delta": None, "cap": 5.0, "tau_positive": 1.0} | changes
    return Numbers(**{"tau_negative": 1.05, **given})


def counts(mask):
    return Counts(rows=len(mask), tokens=int(mask.sum()), groups=1, max_length=mask.shape[1])


def grpo(beta=0.0, epsilon=0.1):
    """The default objective."""
    numbers = {"beta": beta, "epsilon_low": epsilon, "epsilon_high": epsilon}
    return Objective(ratio="token", surrogate="clip", reduction="row", kl="k3", **numbers)


def loss_of(logps, old_logps, ref_logps, advantages, mask, whole, beta=0.0, epsilon=0.1):
    """The loss of some rows of a batch whose mask is `whole`."""
    group = torch.zeros(len(mask), dtype=torch.long)
    inputs = LossInputs(logps, mask, advantages, group, old_logps=old_logps, ref_logps=ref_logps)
    return grpo(beta, epsilon)(inputs, counts(whole))


def test_k3_is_exp_x_minus_x_minus_one_where_x_is_reference_minus_policy():
    logps = torch.tensor([-1.0, -1.0, -1.0])
    ref_logps = torch.tensor([-1.0, -1.0 + math.log(2), -1.0 - math.log(2)])
    expected = torch.tensor([0.0, 2 - math.log(2) - 1, 0.5 + math.log(2) - 1])
    torch.testing.assert_close(k3(logps, ref_logps), expected)


@pytest.mark.parametrize("distance", [5.0, 25.0, 200.0])
def test_k3_pulls_back_a_policy_however_far_it_is_from_the_reference(distance):
    """With x = -distance, k3 is exp(x) - x - 1 and its gradient for the policy is 1 - exp(x)."""
    logps = torch.tensor([0.0], requires_grad=True)
    estimate = k3(logps, torch.tensor([-distance]))
    estimate.backward()
    assert estimate.item() == pytest.approx(math.exp(-distance) + distance - 1)
    assert logps.grad.item() == pytest.approx(1 - math.exp(-distance))


def test_k3_stays_finite_where_the_reference_is_much_likelier_than_the_policy():
    logps = torch.tensor([-500.0], requires_grad=True)
    k3(logps, torch.tensor([0.0])).backward()
    assert torch.isfinite(k3(logps, torch.tensor([0.0]))).all()
    assert torch.isfinite(logps.grad).all()


def test_the_mean_of_k3_over_samples_of_the_policy_is_the_kl_divergence():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), exact)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.2),  # a good completion became likelier: clipped at 1 + epsilon
        (0.5, 2.0, -1.0),  # a good completion became less likely: not clipped
        (1.5, -2.0, 3.0),  # a bad completion became likelier: not clipped
        (0.5, -2.0, 1.8),  # a bad completion became less likely: clipped at 1 - epsilon
    ],
)
def test_clipping_takes_the_larger_of_the_clipped_and_the_unclipped_loss(ratio, advantage, expected):
    loss, _ = clip(torch.tensor([[ratio]]), torch.zeros(1, 1), torch.tensor([[advantage]]), numbers())
    assert loss.item() == pytest.approx(expected)


def test_the_loss_is_the_mean_over_rows_of_the_mean_over_each_rows_tokens():
    logps = torch.zeros(2, 3)
    old_logps = -torch.tensor([[math.log(1.05), 0.0, 0.0], [0.0, 0.0, 0.0]])
    ref_logps = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    advantages = torch.tensor([1.0, -0.5])
    output = loss_of(logps, old_logps, ref_logps, advantages, mask, mask, beta=0.04)
    kl = 2 - math.log(2) - 1
    row_1 = (-1.05 + 0.04 * kl + -1.0) / 2
    assert output.loss.item() == pytest.approx((row_1 + 0.5) / 2)
    total, weight = output.metrics["kl"]
    assert (total.item(), weight.item()) == (pytest.approx(kl), 3)


@pytest.mark.parametrize("outside", [300.0, float("-inf"), float("nan")])
def test_tokens_outside_the_mask_affect_neither_loss_nor_gradient_even_if_not_finite(outside):
    mask = torch.tensor([[1, 1, 0]])
    clean = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    dirty = torch.tensor([[-1.0, -2.0, outside]], requires_grad=True)
    losses = []
    for x in (clean, dirty):
        old, ref = (torch.tensor([[value, value, outside if x is dirty else 0.0]]) for value in (-1.5, -1.2))
        losses.append(loss_of(x, old, ref, torch.tensor([1.0]), mask, mask, beta=0.1, epsilon=0.2).loss)
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert dirty.grad[0, 2] == 0
    assert torch.equal(clean.grad, dirty.grad)


def test_without_old_logps_the_ratio_is_one_and_the_gradient_is_that_of_reinforce():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.long)
    output = loss_of(logps, None, None, torch.tensor([1.5]), mask, mask)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-1.5)
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.75, -0.75]]))


def test_losses_and_metrics_of_the_parts_of_a_batch_add_up_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    logps, old, ref = (-torch.rand(6, 5, generator=generator) for _ in range(3))
    mask = (torch.arange(5) < torch.tensor([1, 5, 3, 2, 4, 5])[:, None]).long()
    advantages = torch.randn(6, generator=generator)
    whole = loss_of(logps, old, ref, advantages, mask, mask, beta=0.04)
    parts = [
        loss_of(logps[p], old[p], ref[p], advantages[p], mask[p], mask, beta=0.04)
        for p in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, (total, weight) in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in parts), total)
        assert sum(part.metrics[name][1] for part in parts) == weight


def test_clip_ratios_count_the_tokens_whose_loss_is_clipped():
    ratio = torch.tensor([[1.2, 0.8, 1.2, 0.8, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.long)
    for advantage, expected in ((1.0, (0, 2)), (-1.0, (2, 0))):
        output = loss_of(ratio.log(), torch.zeros(1, 5), None, torch.tensor([advantage]), mask, mask)
        clipped = {name: (total.item(), weight.item()) for name, (total, weight) in output.metrics.items()}
        low, high = expected
        assert clipped == {
            "clip_ratio/low_mean": (low, 5),
            "clip_ratio/high_mean": (high, 5),
            "clip_ratio/region_mean": (2, 5),
        }


def test_a_very_large_log_ratio_is_clamped_so_that_the_loss_stays_finite():
    assert log_ratio(torch.tensor([[0.0]]), torch.tensor([[-500.0]]), torch.ones(1, 1)).item() == 20.0


def test_the_clip_has_separate_lower_and_upper_limits():
    ratio, advantage = torch.tensor([[1.25, 0.75]]), torch.tensor([[2.0]])
    loss, shares = clip(ratio, torch.zeros(1, 2), advantage, numbers(epsilon_high=0.2))
    assert loss.tolist() == [[pytest.approx(-2.4), pytest.approx(-1.5)]]
    assert shares["clip_ratio/high_mean"].tolist() == [[True, False]]
    loss, shares = clip(ratio, torch.zeros(1, 2), -advantage, numbers(epsilon_high=0.2))
    assert loss.tolist() == [[pytest.approx(2.5), pytest.approx(1.8)]]
    assert shares["clip_ratio/low_mean"].tolist() == [[False, True]]


def test_equal_advantages_per_token_give_the_same_loss_as_one_advantage_per_row():
    generator = torch.Generator().manual_seed(1)
    logps, old, ref = (-torch.rand(2, 3, generator=generator) for _ in range(3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    by_row = loss_of(logps, old, ref, torch.tensor([1.0, -0.5]), mask, mask, beta=0.04)
    by_token = loss_of(logps, old, ref, torch.tensor([[1.0] * 3, [-0.5] * 3]), mask, mask, beta=0.04)
    assert torch.equal(by_row.loss, by_token.loss)


def test_an_unknown_choice_is_refused_with_a_list_of_the_known_ones():
    choices = {choice: next(iter(known)) for choice, known in CHOICES.items()}
    own = {"_target_": "grpo.algorithm.objective.Objective", **choices}
    check_choices(own)
    for choice in CHOICES:
        with pytest.raises(ConfigError, match=rf"objective\.{choice}=x: must be .*, or the dotted path of a function"):
            check_choices(own | {choice: "x"})
    check_choices(own | {"_target_": "theirs.loss", "ratio": "x"})  # not checked: an argument of another function
    with pytest.raises(ConfigError, match=r"objective\.kl=no\.such: .*No module named 'no'"):
        check_choices(own | {"kl": "no.such"})


def test_every_choice_is_listed_as_a_config_key_whose_value_is_a_function():
    assert {f"objective.{choice}" for choice in CHOICES} == FUNCTION_KEYS


def test_importing_the_objective_module_does_not_import_torch():
    code = "import sys, grpo.algorithm.objective; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_those_of_its_tokens():
    ratios = torch.tensor([[2.0, 8.0, 99.0], [3.0, 99.0, 99.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(sequence_ratio(ratios.log(), mask), torch.tensor([[4.0], [3.0], [1.0]]))


def test_delta_limits_the_loss_of_a_bad_completion_that_became_likelier():
    ratio = torch.tensor([[6.0]], requires_grad=True)
    loss, _ = clip(ratio, torch.zeros(1, 1), torch.tensor([[-1.0]]), numbers(delta=4.0))
    loss.sum().backward()
    assert (loss.item(), ratio.grad.item()) == (4.0, 0.0)
    loss, _ = clip(torch.tensor([[6.0]]), torch.zeros(1, 1), torch.tensor([[1.0]]), numbers(delta=4.0))
    assert loss.item() == pytest.approx(-1.1)


def test_cispo_keeps_the_gradient_of_every_token_with_a_limited_weight():
    logps = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    ratio = torch.tensor([[2.0, 9.0]])
    loss, shares = cispo(ratio, logps, torch.tensor([[3.0]]), numbers(cap=5.0))
    loss.sum().backward()
    assert logps.grad.tolist() == [[-6.0, -15.0]]
    assert shares["cispo_clip_ratio"].tolist() == [[False, True]]


def test_sapo_weighs_tokens_less_the_further_the_ratio_is_from_1():
    """The gradient for the ratio is -4 sigmoid'(tau (ratio - 1)) A, which is -A at ratio 1."""
    ratio = torch.tensor([[1.0, 3.0]], requires_grad=True)
    loss, _ = sapo(ratio, torch.zeros(1, 2), torch.tensor([[2.0]]), numbers())
    loss.sum().backward()
    sigmoid = 1 / (1 + math.exp(-2.0))
    torch.testing.assert_close(ratio.grad, torch.tensor([[-2.0, -8.0 * sigmoid * (1 - sigmoid)]]))
    loss, _ = sapo(torch.tensor([[2.0]]), torch.zeros(1, 1), torch.tensor([[-1.0]]), numbers(tau_negative=2.0))
    assert loss.item() == pytest.approx(2.0 / (1 + math.exp(-2.0)))


def test_the_other_kl_estimates():
    logps, ref_logps = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    torch.testing.assert_close(k1(logps, ref_logps), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(k2(logps, ref_logps), torch.tensor([0.125, 0.5]))
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k1(policy, reference)).sum(), exact)


def test_the_reductions_by_hand():
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    whole = Counts(rows=2, tokens=3, groups=1, max_length=10)
    found = {name: reduce(values, mask, whole).item() for name, reduce in CHOICES["reduction"].items()}
    assert found == {"row": 3.5, "token": 3.0, "constant": pytest.approx(0.45), "length": 4.5}


def test_the_corrected_kl_has_the_gradient_of_the_kl_divergence_on_average():
    """The mean over samples of the gradient of ratio * k3, at ratio 1, is the gradient of the exact divergence."""
    logits = torch.tensor([0.7, 0.2, 0.1]).log().requires_grad_()
    reference = torch.tensor([0.3, 0.3, 0.4]).log()
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    probabilities = policy.exp().detach()
    for correction in (True, False):
        choices = {"ratio": "token", "surrogate": "clip", "reduction": "token", "kl": "k3"}
        objective = Objective(**choices, beta=1.0, epsilon_low=0.1, epsilon_high=0.1, kl_correction=correction)
        total = torch.zeros(3)
        for token in range(3):
            inputs = LossInputs(
                policy[token].view(1, 1),
                torch.ones(1, 1, dtype=torch.long),
                torch.zeros(1),
                torch.zeros(1, dtype=torch.long),
                ref_logps=reference[token].view(1, 1),
            )
            loss = objective(inputs, Counts(rows=1, tokens=1, groups=1, max_length=1)).loss
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            total += probabilities[token] * gradient
        assert torch.allclose(total, exact, atol=1e-6) == correction


def test_the_entropy_bonus_is_the_mean_over_the_tokens_of_the_batch():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    entropy = torch.tensor([[2.0, 4.0, 99.0], [3.0, 99.0, 99.0]], requires_grad=True)
    choices = {"ratio": "token", "surrogate": "clip", "reduction": "row", "kl": "k3"}
    objective = Objective(**choices, beta=0.0, epsilon_low=0.1, epsilon_high=0.1, entropy_weight=0.5)
    assert objective.needs_entropy_gradient
    inputs = LossInputs(torch.zeros(2, 3), mask, torch.zeros(2), torch.zeros(2, dtype=torch.long), entropy=entropy)
    loss = objective(inputs, counts(mask)).loss
    loss.backward()
    assert loss.item() == -1.5
    torch.testing.assert_close(entropy.grad, -0.5 / 3 * mask)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("token_truncate", [[2.0, 3.0, 1.0], [0.5, 1.0, 1.0]]),
        ("token_mask", [[2.0, 0.0, 1.0], [0.5, 1.0, 1.0]]),
        ("sequence_truncate", [[3.0], [0.5]]),
        ("sequence_mask", [[0.0], [0.5]]),
    ],
)
def test_weights_against_a_difference_between_sampling_and_training_by_hand(correction, expected):
    ratios = torch.tensor([[2.0, 4.0, 1.0], [0.5, 1.0, 1.0]])
    weight = sampling_weight(ratios.log(), torch.ones(2, 3), correction, cap=3.0)
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_the_sampling_correction_multiplies_the_surrogate_and_not_the_kl():
    choices = {"ratio": "token", "surrogate": "clip", "reduction": "row", "kl": "k2"}
    numbers_ = {"beta": 1.0, "epsilon_low": 0.1, "epsilon_high": 0.1}
    objective = Objective(**choices, **numbers_, sampling_correction="token_truncate")
    mask = torch.ones(1, 1, dtype=torch.long)
    inputs = LossInputs(
        torch.tensor([[-1.0]]),
        mask,
        torch.tensor([2.0]),
        torch.zeros(1, dtype=torch.long),
        ref_logps=torch.tensor([[-3.0]]),
        sampling_logps=torch.tensor([[-1.0 - math.log(2)]]),
    )
    output = objective(inputs, counts(mask))
    assert output.loss.item() == pytest.approx(-2.0 * 2.0 + 2.0)
    total, weight = output.metrics["sampling/importance_sampling_ratio/mean"]
    assert (total.item(), weight.item()) == (pytest.approx(2.0), 1)
    old = dataclasses.replace(inputs, old_logps=torch.tensor([[-1.0 + math.log(1.5)]]))  # the ratio is 1 / 1.5
    assert objective(old, counts(mask)).loss.item() == pytest.approx(-2.0 / 1.5 * 3.0 + 2.0)
    outside = dataclasses.replace(
        inputs,
        logps=torch.tensor([[-1.0, 0.0]]),
        mask=torch.tensor([[1, 0]]),
        ref_logps=torch.tensor([[-3.0, 0.0]]),
        sampling_logps=torch.tensor([[-1.0 - math.log(2), -math.inf]]),
    )
    assert objective(outside, counts(outside.mask)).loss.item() == pytest.approx(-2.0 * 2.0 + 2.0)
    with pytest.raises(RuntimeError, match="the rollout engine returns no log-probabilities"):
        objective(dataclasses.replace(inputs, sampling_logps=None), counts(mask))
