"""The loss against numbers worked out by hand; test_trl_parity.py compares it with an independent oracle."""

import math

import pytest
import torch

from grpo.algorithm.loss import BatchCounts, clipped_objective, grpo_loss, kl_k3, log_ratio


def counts(mask):
    return BatchCounts(rows=len(mask), tokens=int(mask.sum()))


def test_k3_is_exp_x_minus_x_minus_one_of_reference_minus_policy():
    logps = torch.tensor([-1.0, -1.0, -1.0])
    ref_logps = torch.tensor([-1.0, -1.0 + math.log(2), -1.0 - math.log(2)])
    expected = torch.tensor([0.0, 2 - math.log(2) - 1, 0.5 + math.log(2) - 1])
    torch.testing.assert_close(kl_k3(logps, ref_logps), expected)


def test_k3_is_the_kl_divergence_on_average_over_samples_of_the_policy():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_k3(policy, reference)).sum(), exact)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.2),  # better than before, but no further than 1 + epsilon
        (0.5, 2.0, -1.0),  # worse than before: the full loss, unclipped
        (1.5, -2.0, 3.0),  # a bad completion became likelier: the full loss
        (0.5, -2.0, 1.8),  # a bad completion is unlikely enough: clipped at 1 - epsilon
    ],
)
def test_clipping_is_pessimistic_on_the_right_side(ratio, advantage, expected):
    loss = clipped_objective(torch.tensor([[ratio]]), torch.tensor([[advantage]]), epsilon=0.1)
    assert loss.item() == pytest.approx(expected)


def test_loss_is_the_mean_over_rows_of_each_rows_token_mean():
    logps = torch.zeros(2, 3)
    old_logps = -torch.tensor([[math.log(1.05), 0.0, 0.0], [0.0, 0.0, 0.0]])
    ref_logps = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    advantages = torch.tensor([1.0, -0.5])
    output = grpo_loss(logps, old_logps, ref_logps, advantages, mask, counts(mask), beta=0.04, epsilon=0.1)
    kl = 2 - math.log(2) - 1
    row_1 = (-1.05 + 0.04 * kl + -1.0) / 2
    assert output.loss.item() == pytest.approx((row_1 + 0.5) / 2)
    assert output.sums["kl"].item() == pytest.approx(kl)


@pytest.mark.parametrize("outside", [300.0, float("-inf"), float("nan")])
def test_tokens_outside_the_mask_change_nothing_even_when_they_are_infinite(outside):
    mask = torch.tensor([[1, 1, 0]])
    arguments = {"advantages": torch.tensor([1.0]), "mask": mask, "counts": counts(mask), "beta": 0.1, "epsilon": 0.2}
    clean = torch.tensor([[-1.0, -2.0, 0.0]], requires_grad=True)
    dirty = torch.tensor([[-1.0, -2.0, outside]], requires_grad=True)
    losses = []
    for x in (clean, dirty):
        old, ref = (torch.tensor([[value, value, outside if x is dirty else 0.0]]) for value in (-1.5, -1.2))
        losses.append(grpo_loss(x, old, ref, **arguments).loss)
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert dirty.grad[0, 2] == 0
    assert torch.equal(clean.grad, dirty.grad)


def test_without_old_logps_the_ratio_is_one_and_the_gradient_is_that_of_reinforce():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.long)
    output = grpo_loss(logps, None, None, torch.tensor([1.5]), mask, counts(mask), beta=0.0, epsilon=0.1)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-1.5)
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.75, -0.75]]))


def test_parts_of_a_batch_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logps, old, ref = (-torch.rand(6, 5, generator=generator) for _ in range(3))
    mask = (torch.arange(5) < torch.tensor([1, 5, 3, 2, 4, 5])[:, None]).long()
    advantages = torch.randn(6, generator=generator)
    whole = grpo_loss(logps, old, ref, advantages, mask, counts(mask), beta=0.04, epsilon=0.1)
    parts = [
        grpo_loss(logps[p], old[p], ref[p], advantages[p], mask[p], counts(mask), beta=0.04, epsilon=0.1)
        for p in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, total in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), total)


def test_clip_shares_count_the_tokens_whose_gradient_is_cut():
    ratio = torch.tensor([[1.2, 0.8, 1.2, 0.8, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.long)
    for advantage, expected in ((1.0, (0, 2)), (-1.0, (2, 0))):
        output = grpo_loss(
            ratio.log(), torch.zeros(1, 5), None, torch.tensor([advantage]), mask, counts(mask), beta=0.0, epsilon=0.1
        )
        assert (output.sums["clip_low"].item(), output.sums["clip_high"].item()) == expected
        assert output.sums["clip_region"].item() == 2


def test_an_absurd_log_ratio_is_clamped_so_that_the_loss_stays_finite():
    assert log_ratio(torch.tensor([[0.0]]), torch.tensor([[-500.0]]), torch.ones(1, 1)).item() == 20.0
