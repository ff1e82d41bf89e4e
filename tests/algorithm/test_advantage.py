import math

import pytest
import torch

from grpo.algorithm.advantage import (
    batch_advantage,
    centered_advantage,
    comparable_reward,
    equal_groups,
    group_advantage,
    group_std,
    leave_one_out_advantage,
    mean_scaled_advantage,
    normalize_then_sum_advantage,
    standardize,
    total_reward,
)
from grpo.algorithm.objective import CHOICES

NAN = math.nan


def test_rewards_are_standardised_within_their_group_with_the_sample_standard_deviation():
    rewards = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 5.0]])
    # Group 1: mean 2, std sqrt(2) (ddof=1), so +-1 / (sqrt(2) + 1e-4); group 3: mean 3.5, std 1.5 * sqrt(2).
    expected = torch.tensor([[-0.7070568, 0.7070568], [0.0, 0.0], [-0.7070735, 0.7070735]])
    torch.testing.assert_close(standardize(rewards), expected, rtol=0, atol=1e-6)


def test_equal_rewards_give_zero_advantage_even_if_their_computed_deviation_is_not_zero():
    rewards = torch.full((1, 7), 2.0 + 0.8 * 0.1)
    rewards[0, 3] += 2e-7  # the rounding error of a sum in another order
    assert rewards.std() > 0
    assert equal_groups(rewards).tolist() == [True]
    assert standardize(rewards).abs().max() == 0


def test_a_small_real_difference_in_reward_gives_an_advantage():
    advantages = standardize(torch.tensor([[0.2, 0.0, 0.0, 0.0]]))
    assert advantages[0, 0] > 1.4
    assert advantages.sum().abs() < 1e-5


def test_a_group_with_one_completion_has_zero_advantage():
    assert standardize(torch.tensor([[2.8], [0.0]])).tolist() == [[0.0], [0.0]]


def test_the_total_reward_is_weighted_and_a_missing_value_adds_nothing():
    rewards = torch.tensor([[[1.0, 4.0], [2.0, 8.0]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    weights = torch.tensor([1.0, 0.5])
    assert total_reward(rewards, weights, valid).tolist() == [[3.0, 2.0]]
    everything = torch.ones_like(valid)
    assert torch.equal(group_advantage(rewards, weights, everything), standardize(torch.tensor([[3.0, 6.0]])))


def test_the_total_reward_is_missing_only_where_every_component_is():
    rewards = torch.tensor([[[1.0, 4.0], [2.0, 8.0]]])
    valid = torch.tensor([[[False, True], [False, False]]])
    total = total_reward(rewards, torch.tensor([1.0, 0.5]), valid)
    assert total[0, 0] == 2.0
    assert total[0, 1].isnan()


def test_a_missing_reward_is_not_part_of_the_baseline_and_its_advantage_is_0():
    """As in TRL 1.16, where a missing reward counted as 0 before."""
    rewards = torch.tensor([[2.0, 2.0, NAN, 2.0], [2.0, 0.0, NAN, 1.0]], dtype=torch.float64)
    advantages = standardize(rewards)
    assert advantages[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    # Of 2, 0 and 1: mean 1, std 1.
    assert advantages[1].tolist() == pytest.approx([1 / 1.0001, -1 / 1.0001, 0.0, 0.0])


def test_a_group_with_fewer_than_two_rewards_has_nothing_to_compare():
    rewards = torch.tensor([[NAN, NAN, NAN], [NAN, 5.0, NAN], [1.0, 5.0, NAN]])
    assert equal_groups(rewards).tolist() == [True, True, False]
    assert standardize(rewards)[:2].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert group_std(rewards)[:2].isnan().all()
    assert float(group_std(rewards)[2]) == pytest.approx(math.sqrt(8))


def test_a_completion_that_lacks_a_component_of_its_group_is_not_compared():
    weights = torch.tensor([1.0, 0.5])
    first, second = [1.0, 4.0], [2.0, 8.0]
    rewards = torch.tensor([[first, second, second]] * 3)
    valid = torch.tensor(
        [
            [[True, True], [True, False], [True, True]],  # the second completion has no value of component 2
            [[True, False], [True, False], [True, False]],  # component 2 does not apply to this prompt
            [[False, False], [False, True], [False, True]],  # nor component 1 to this; the first has no value at all
        ]
    )
    expected = torch.tensor([[3.0, NAN, 6.0], [1.0, 2.0, 2.0], [NAN, 4.0, 4.0]])
    torch.testing.assert_close(comparable_reward(rewards, weights, valid), expected, equal_nan=True)
    advantages = group_advantage(rewards, weights, valid)
    torch.testing.assert_close(advantages, standardize(expected))
    assert advantages[0, 1] == advantages[2, 0] == 0
    assert advantages[0, 0] == -advantages[0, 2] != 0


def test_a_missing_value_of_a_component_with_weight_0_does_not_matter():
    rewards = torch.tensor([[[1.0, 0.0], [3.0, 7.0]]])
    valid = torch.tensor([[[True, False], [True, True]]])
    assert comparable_reward(rewards, torch.tensor([1.0, 0.0]), valid).tolist() == [[1.0, 3.0]]


@pytest.mark.parametrize("weight", [1.0, 1e-6, 1e-9, 1e6])
def test_differences_carry_a_signal_whatever_the_weights(weight):
    """Also beside a component that is equal for all, and much larger."""
    values = torch.tensor([[[2.0, 0.2], [2.0, 0.8], [2.0, 0.2]]], dtype=torch.float64)
    valid = torch.ones(1, 3, 2, dtype=torch.bool)
    alone = group_advantage(values[..., 1:], torch.tensor([weight]), valid[..., 1:])
    both = group_advantage(values, torch.tensor([1.0, weight]), valid)
    for advantages in (alone, both):
        assert advantages[0, 1] > 0
        assert advantages[0, 0] < 0
    deviation = 0.6 * weight / math.sqrt(3)  # of 0.2, 0.8, 0.2, times the weight
    assert float(alone[0, 1]) == pytest.approx(0.4 * weight / (deviation + 1e-4))


def test_the_rounding_of_a_sum_is_no_signal():
    terms = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], dtype=torch.float64)
    sums = torch.stack([(row[0] + row[1]) + row[2] for row in terms])
    assert sums[0] != sums[1]
    for scale in (1.0, 1e6, 1e-6):
        assert equal_groups(scale * sums[None]).tolist() == [True]
    assert equal_groups((sums - 0.6)[None]).tolist() == [True]  # 1e-16 and 0


def of_one_component(function, rewards):
    """The advantages of rewards (P, G) of one component of weight 1; NaN is missing."""
    rewards = torch.tensor(rewards)[..., None]
    return function(rewards.nan_to_num(0.0), torch.ones(1), ~rewards.isnan())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # The means are 2 and 0; the standard deviation of all six rewards is sqrt(16.8 / 5), as their mean is 1.2.
        (centered_advantage, [[-2.0, 0.0, 2.0], [0.0, 0.0, NAN]]),
        (leave_one_out_advantage, [[-3.0, 0.0, 3.0], [0.0, 0.0, NAN]]),
        (batch_advantage, [[-2 / 1.7889544, 0.0, 2 / 1.7889544], [0.0, 0.0, NAN]]),
        (mean_scaled_advantage, [[-2 / 2.0001, 0.0, 2 / 2.0001], [0.0, 0.0, NAN]]),
    ],
)
def test_advantages_by_hand(function, expected):
    found = of_one_component(function, [[0.0, 2.0, 4.0], [0.0, 0.0, NAN]])
    torch.testing.assert_close(found, torch.tensor(expected).nan_to_num(0.0), rtol=1e-5, atol=1e-6)


def test_gdpo_gives_components_of_different_ranges_the_influence_of_their_weights():
    rewards = torch.tensor([[[100.0, 0.0], [0.0, 1.0]], [[100.0, 1.0], [0.0, 0.0]]])
    valid = torch.ones_like(rewards, dtype=torch.bool)
    found = normalize_then_sum_advantage(rewards, torch.tensor([1.0, 1.0]), valid)
    # In group 1 the components contradict each other and cancel, although one is a hundred times as large.
    torch.testing.assert_close(found[0], torch.zeros(2), rtol=0, atol=2e-3)
    # The sums of group 2 are +-2 / sqrt(2), so that the standard deviation over the four is sqrt(4 / 3).
    torch.testing.assert_close(found[1], torch.tensor([1.0, -1.0]) * 2**0.5 / (4 / 3) ** 0.5, rtol=1e-3, atol=0)
    assert group_advantage(rewards, torch.tensor([1.0, 1.0]), valid)[0].abs().min() > 0.7


def test_in_gdpo_components_that_cancel_give_no_signal():
    rewards = torch.tensor(
        [[[1.0, 0.0, 0.2], [0.0, 1.0, 0.2], [0.3, 0.7, 0.2]], [[1.0, 0.0, 0.2], [0.0, 0.0, 0.1], [0.3, 0.7, 0.2]]]
    )
    found = normalize_then_sum_advantage(
        rewards.double(), torch.ones(3).double(), torch.ones(2, 3, 3, dtype=torch.bool)
    )
    assert found[0].abs().max() == 0
    assert found[1].abs().min() > 0


def test_in_gdpo_a_missing_component_adds_nothing():
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    valid = torch.tensor([[[True, False], [True, False], [False, False]]])
    found = normalize_then_sum_advantage(rewards, torch.ones(2), valid)
    assert found[0, 0] == -found[0, 1] > 0
    assert found[0, 2] == 0


@pytest.mark.parametrize("name", CHOICES["advantage"])
def test_every_advantage_is_0_without_a_signal_and_finite(name):
    function = CHOICES["advantage"][name]
    for rewards in ([[0.3, 0.3], [NAN, 0.2]], [[NAN, NAN]], [[1.0]]):
        assert of_one_component(function, rewards).abs().max() == 0, rewards
    mixed = of_one_component(function, [[0.0, 1.0], [0.5, 0.5], [NAN, NAN]])
    assert mixed[0, 1] > 0 > mixed[0, 0]
    assert mixed[1:].abs().max() == 0
