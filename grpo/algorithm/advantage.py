"""Advantages: how much better a completion is than the others of its own group."""

import torch
from torch import Tensor

EQUAL_REWARDS = 1e-6  # rewards nearer than this are one reward: their differences are rounding, not signal


def group_advantages(rewards: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Rewards standardised within each prompt's group: `(r - mean) / (std + epsilon)`, std with ddof=1.

    rewards: (P, G), one row a prompt. Returns (P, G). A group of one, or whose rewards are all equal, has
    nothing to compare and gets advantage 0.
    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    std = rewards.std(dim=1, keepdim=True)
    return torch.where(equal_groups(rewards)[:, None], 0.0, (rewards - mean) / (std + epsilon))


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups teach nothing because all their rewards are equal. rewards (P, G) -> bool (P,).

    Compares max - min with a tolerance: the standard deviation of equal float32 numbers need not be exactly 0.
    """
    return rewards.amax(dim=1) - rewards.amin(dim=1) < EQUAL_REWARDS
