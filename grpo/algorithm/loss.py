"""The GRPO loss as pure functions on tensors.

Shapes: B rows (completions), T tokens. `mask` (B, T) is 1 through the first end-of-sequence token, inclusive.
All log-probabilities are of the sampled tokens, with logits divided by the sampling temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 and bfloat16; beyond it only the sign matters


@dataclass(frozen=True)
class BatchCounts:
    """What the loss is divided by: counts over the whole batch, known before its first micro-batch.

    Dividing by the whole batch's counts is what keeps the gradient the same however the batch is cut.
    """

    rows: int
    tokens: int  # active completion tokens, sum of the mask


@dataclass(frozen=True)
class LossOutput:
    """The part of the loss that some rows contribute, and sums over their active tokens for the metrics."""

    loss: Tensor  # scalar with gradient; the parts of a batch add up to the batch's loss
    sums: dict[str, Tensor]  # kl, clip_low, clip_high, clip_region: scalars, divide by BatchCounts.tokens


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """`logps - old_logps` (B, T), zero outside the mask and clamped, so that its exp is finite everywhere."""
    return ((logps - old_logps) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate per token (B, T) of KL(policy || reference): `exp(x) - x - 1`, `x = ref_logps - logps`.

    Never negative and unbiased for samples of the policy.
    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath (arXiv 2402.03300), equation 4.
    """
    x = (ref_logps - logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(x) - x - 1


def clipped_objective(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """PPO's pessimistic surrogate per token, to be minimised: `-min(ratio A, clip(ratio, 1-eps, 1+eps) A)`.

    ratio (B, T), advantages (B, 1) -> (B, T). Source: DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    return -torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    counts: BatchCounts,
    *,
    beta: float,
    epsilon: float,
) -> LossOutput:
    """GRPO: clipped ratio times advantage plus `beta` times KL, averaged over each row's tokens, then over rows.

    logps, old_logps, ref_logps, mask: (B, T); advantages: (B,). `old_logps=None` means that the policy has not
    moved since it sampled: the ratio is then 1 and only its gradient counts. `ref_logps` is needed only where
    `beta > 0`. Rows may be a part of the batch that `counts` describes.
    Source: DeepSeekMath (arXiv 2402.03300), equation 3 and Algorithm 1.
    """
    keep, mask = mask.bool(), mask.to(logps.dtype)
    logps = logps.where(keep, 0.0)  # not by a product: what stands outside the mask may be infinite
    old_logps = logps.detach() if old_logps is None else old_logps.where(keep, 0.0)
    advantages = advantages[:, None]
    ratio = torch.exp(log_ratio(logps, old_logps, mask))
    per_token = clipped_objective(ratio, advantages, epsilon)

    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon) & (advantages > 0)
    sums = {"clip_low": low * mask, "clip_high": high * mask, "clip_region": (low | high) * mask}
    if beta > 0:
        assert ref_logps is not None  # else there is nothing to measure the distance from
        kl = kl_k3(logps, ref_logps.where(keep, 0.0))
        per_token = per_token + beta * kl
        sums["kl"] = kl.detach() * mask

    row_lengths = mask.sum(dim=1).clamp(min=1)
    loss = ((per_token * mask).sum(dim=1) / row_lengths).sum() / counts.rows
    return LossOutput(loss, {name: value.sum() for name, value in sums.items()})
