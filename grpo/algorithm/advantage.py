"""Advantages: how much better a completion is than the others of its group.

Importing it does not import torch, so that a launch can check the names in a config quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation or mean before a division, as in TRL


def group_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward standardised within each prompt's group.

    rewards: (P, G, C), for P prompts, G completions of each and C reward components; weights: (C,);
    valid: (P, G, C) bool, False where a component gave no value. Returns (P, G).
    Source: DeepSeekMath (arXiv 2402.03300), section 4.1.2, outcome supervision.
    """
    return standardize(comparable_reward(rewards, weights, valid))


def batch_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward minus the mean of its group, divided by the standard deviation over the whole batch.

    Shapes: as for `group_advantage`. Source: Lite PPO (arXiv 2508.08221).
    """
    total = comparable_reward(rewards, weights, valid)
    return _centered(total) / (_std(total) + EPSILON)


def centered_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward minus the mean of its group. Shapes: as for `group_advantage`.

    Source: Dr. GRPO (arXiv 2503.20783).
    """
    return _centered(comparable_reward(rewards, weights, valid))


def leave_one_out_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward minus the mean of the others of its group. Shapes: as for `group_advantage`.

    Source: RLOO (arXiv 2402.14740).
    """
    total = comparable_reward(rewards, weights, valid)
    present = (~total.isnan()).sum(dim=1, keepdim=True)  # (P, 1)
    # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1); groups of one are 0 already.
    return _centered(total) * present / (present - 1).clamp(min=1)


def normalize_then_sum_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Each component standardised in its group, their weighted sum standardised over the batch.

    Components of different ranges then have the influence that their weights say. A component without a value for a
    completion adds nothing to it. Shapes: as for `group_advantage`. Source: GDPO (arXiv 2601.05242).
    """
    present = rewards.where(valid, float("nan"))
    by_component = [standardize(present[..., c]) for c in range(rewards.shape[-1])]  # each (P, G)
    total = sum(weight * each for weight, each in zip(weights, by_component, strict=True))
    total = total.where((valid & (weights != 0)).any(dim=-1), float("nan"))
    with_signal = ~total.isnan() & ~equal_groups(total)[:, None]
    return ((total - total.nanmean()) / (_std(total) + EPSILON)).where(with_signal, 0.0)


def mean_scaled_advantage(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward minus the mean of its group, divided by this mean; 0 where the mean is 0.

    For rewards from 0 to 1: then it weights problems by how rarely they are solved, as maximum likelihood does. Shapes:
    as for `group_advantage`. Source: MaxRL (arXiv 2602.02710).
    """
    total = comparable_reward(rewards, weights, valid)
    mean = total.nanmean(dim=1, keepdim=True).nan_to_num(0.0)
    return (_centered(total) / (mean + EPSILON)).where(mean != 0, 0.0)


def total_reward(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The weighted sum of the reward components, (..., C) -> (...); NaN where no component gave a value.

    A missing value adds nothing.
    """
    total = rewards.new_zeros(rewards.shape[:-1])
    for component, weight in enumerate(weights):
        total = total + weight * rewards[..., component].where(valid[..., component], 0.0)
    return total.where(valid.any(dim=-1), float("nan"))


def comparable_reward(rewards: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """The total reward (P, G), NaN for a completion that cannot be compared with the others of its group.

    It cannot if it lacks the value of a component that others of its group have: its total would be lower for a reason
    that says nothing about it. A component without a value for the whole group does not apply to this prompt, and is
    left out for all. Components of weight 0 do not matter. Arguments: as for `group_advantage`.
    """
    weighted = valid & (weights != 0)
    expected = weighted.any(dim=1, keepdim=True)  # (P, 1, C)
    complete = (weighted == expected).all(dim=-1)
    return total_reward(rewards, weights, weighted).where(complete, float("nan"))


def standardize(rewards: Tensor) -> Tensor:
    """`(r - mean) / (std + 1e-4)` within each group, std with ddof=1: (P, G) -> (P, G).

    A reward that is NaN is missing: it is not part of mean and std, and its advantage is 0, as in TRL 1.16. The
    advantages of a group with fewer than two rewards, or with equal ones, are 0: there is nothing to compare.
    """
    std = group_std(rewards)[:, None].nan_to_num(0.0)
    return _centered(rewards) / (std + EPSILON)


def _centered(rewards: Tensor) -> Tensor:
    """`r - mean` within each group, (P, G) -> (P, G); 0 where a reward is NaN, and in groups without a signal."""
    with_signal = ~rewards.isnan() & ~equal_groups(rewards)[:, None]
    return (rewards - rewards.nanmean(dim=1, keepdim=True)).where(with_signal, 0.0)


def _std(rewards: Tensor) -> Tensor:
    """Standard deviation (ddof=1) of all rewards that are not NaN, a scalar; 0 if there are fewer than two."""
    known = rewards[~rewards.isnan()]
    return known.std() if len(known) > 1 else known.new_zeros(())


def group_std(rewards: Tensor) -> Tensor:
    """Standard deviation (ddof=1) of the rewards of each group that are not NaN: (P, G) -> (P,).

    NaN for a group with fewer than two.
    """
    if rewards.shape[1] == 1:
        return rewards.new_full(rewards.shape[:1], float("nan"))
    present = ~rewards.isnan()
    # torch has no std that skips NaN. The mean in the place of a missing reward adds nothing to the sum of squares.
    std = rewards.where(present, rewards.nanmean(dim=1, keepdim=True)).std(dim=1)
    return std * ((rewards.shape[1] - 1) / (present.sum(dim=1) - 1)).sqrt()


def equal_groups(rewards: Tensor) -> Tensor:
    """Which groups carry no signal: all rewards are equal, or fewer than two are not NaN. (P, G) -> (P,) bool.

    Rewards are equal if they differ only by rounding: the standard deviation of equal numbers need not be exactly 0.
    """
    import torch  # here, see above

    present = ~rewards.isnan()
    highest = rewards.where(present, -torch.inf).amax(dim=1)
    lowest = rewards.where(present, torch.inf).amin(dim=1)
    rounding = 8 * torch.finfo(rewards.dtype).eps  # of a sum of a few components, relative to the total
    return torch.isclose(highest, lowest, rtol=rounding, atol=1e-12) | (present.sum(dim=1) < 2)
