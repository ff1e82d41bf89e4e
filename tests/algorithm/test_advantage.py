import torch

from grpo.algorithm.advantage import equal_groups, group_advantage, standardize, total_reward


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
    assert torch.equal(group_advantage(rewards, weights, valid), standardize(torch.tensor([[3.0, 2.0]])))
