"""Advantages: how much better a completion is than the others of its group.

Does not import torch, so that a launch can check the names in a config quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EQUAL_REWARDS = 1e-6  # rewards that differ by less count as equal: the difference is rounding error, not signal


def group_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward standardised within each prompt's group.

    rewards: (P, G, C), for P prompts, G completions of each and C reward components; weights: (C,);
    valid: (P, G, C) bool, False where a component gave no value. Returns (P, G).
    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision.
    """
    return standardize(total_reward(rewards, weights, valid))


def total_reward(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The weighted sum of the reward components, (..., C) -> (...); a missing value adds nothing."""
    total = rewards.new_zeros(rewards.shape[:-1])
    for component, weight in enumerate(weights):
        total = total + weight * rewards[..., component].where(valid[..., component], 0.0)
    return total


def standardize(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """`(r - mean) / (std + epsilon)` within each group, std with ddof=1: (P, G) -> (P, G).

    The advantages of a group with a single completion, or with equal rewards, are 0: there is nothing to compare.
    """
    if rewards.shape[1] == 1:
        return rewards.new_zeros(rewards.shape)
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    return ((rewards - mean) / (std + epsilon)).where(~equal_groups(rewards)[:, None], 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups carry no signal because all their rewards are equal: (P, G) -> (P,) bool.

    Compares max - min with a tolerance: the standard deviation of equal float32 numbers need not be exactly 0.
    """
    return rewards.amax(dim=1) - rewards.amin(dim=1) < EQUAL_REWARDS
