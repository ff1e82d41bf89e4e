"""The objective of a policy update, composed of choices, each of them a small pure function on tensors.

Shapes: m rows (completions) of t tokens; the rows may be a part of a batch. `mask` (m, t) is 1 for tokens that count in
the loss. Log-probabilities are those of the sampled tokens, with logits divided by the sampling temperature.

A config in conf/objective/ selects each choice by its name in `CHOICES`, or by the dotted path of another function.
This module does not import torch, so that a launch can check these names quickly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo.algorithm.advantage import (
    batch_advantage,
    centered_advantage,
    group_advantage,
    leave_one_out_advantage,
    mean_scaled_advantage,
    normalize_then_sum_advantage,
)
from grpo.config.errors import ConfigError
from grpo.config.instantiate import check_call, find_function

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 and bfloat16


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss of m completions. Only `logps` carries a gradient, and `entropy` if the objective asks for it.

    An objective asks for it by an attribute `needs_entropy_gradient` that is true.
    """

    logps: Tensor  # (m, t) float32, of the policy
    mask: Tensor  # (m, t) int64, 1 for tokens that count in the loss
    advantages: Tensor  # (m,) float32, or (m, t)
    group: Tensor  # (m,) int64, equal for completions of the same prompt; a group may be incomplete here
    old_logps: Tensor | None = None  # (m, t), of the policy that sampled; None: the policy has not changed since
    ref_logps: Tensor | None = None  # (m, t), of the reference model; None if beta is 0
    sampling_logps: Tensor | None = None  # (m, t), from the rollout engine; None if it computes none
    entropy: Tensor | None = None  # (m, t), of the policy's distribution at each token


@dataclass(frozen=True)
class Counts:
    """Sizes of the whole batch that is trained on, known before its first micro-batch.

    Gradients of losses that are divided by them add up to the same total for every split of the batch.
    """

    rows: int  # completions with a token that counts in the loss
    tokens: int  # tokens that count in the loss
    groups: int  # prompts
    max_length: int  # maximum tokens of a completion


@dataclass(frozen=True)
class LossOutput:
    """The contribution of some rows of a batch to its loss and metrics."""

    loss: Tensor  # scalar with gradient; the sum over the parts of a batch is the batch's loss
    metrics: dict[str, tuple[Tensor, Tensor]]  # name -> scalars (sum, weight); summed over parts, then divided


ObjectiveFunction = Callable[[LossInputs, Counts], LossOutput]


@dataclass(frozen=True)
class Numbers:
    """The numbers that a surrogate gets."""

    epsilon_low: float  # `clip`: the ratio is clipped below 1 - epsilon_low
    epsilon_high: float  # `clip`: the ratio is clipped above 1 + epsilon_high
    delta: float | None  # `clip`: upper limit of the ratio where it is not clipped; None: no limit
    cap: float  # `cispo`: upper limit of the ratio
    tau_positive: float  # `sapo`: temperature for positive advantages
    tau_negative: float  # `sapo`: and for the others


class Objective:
    """A surrogate of probability ratio and advantages, plus beta times a KL estimate, reduced to a scalar."""

    def __init__(
        self,
        *,
        ratio: str,
        surrogate: str,
        reduction: str,
        kl: str,
        beta: float,
        epsilon_low: float,
        epsilon_high: float,
        kl_correction: bool = False,
        entropy_weight: float = 0.0,
        sampling_correction: str | None = None,
        sampling_cap: float = 3.0,
        delta: float | None = None,
        cap: float = 5.0,
        tau_positive: float = 1.0,
        tau_negative: float = 1.05,
    ) -> None:
        """The choices by name (see `choose`). Raises ConfigError for an unknown choice.

        beta: weight of the KL term. kl_correction: whether that is multiplied by the ratio, with gradient, so that with
        the ratio of tokens its gradient is that of the KL divergence on average (DeepSeek-V3.2, arXiv 2512.02556).
        entropy_weight: weight of the policy's mean entropy per token, which is subtracted from the loss.
        sampling_correction, sampling_cap: see `sampling_weight`; None: no correction. The others: see `Numbers`.
        """
        self._ratio = choose("ratio", ratio)
        self._surrogate = choose("surrogate", surrogate)
        self._reduction = choose("reduction", reduction)
        self._kl = choose("kl", kl)
        self.beta = beta
        self.entropy_weight = entropy_weight
        self.needs_entropy_gradient = entropy_weight > 0
        # Whether completions with an advantage of 0 have no part in the loss and its gradient. A surrogate or reduction
        # of the user may give them one.
        of_suite = surrogate in CHOICES["surrogate"] and reduction in CHOICES["reduction"]
        self.needs_advantage = beta == 0 and entropy_weight == 0 and of_suite
        self._kl_correction = kl_correction
        self._sampling_correction = sampling_correction
        self._sampling_cap = sampling_cap
        self.numbers = Numbers(epsilon_low, epsilon_high, delta, cap, tau_positive, tau_negative)

    def __call__(self, inputs: LossInputs, counts: Counts) -> LossOutput:
        """Loss and metrics of some rows of the batch that `counts` describes; metrics: the surrogate's, and kl."""
        counted = inputs.mask.bool()
        mask = inputs.mask.to(inputs.logps.dtype)
        # `where` instead of a product, because values outside the mask may be infinite.
        logps = inputs.logps.where(counted, 0.0)
        old_logps = logps.detach() if inputs.old_logps is None else inputs.old_logps.where(counted, 0.0)
        advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None]
        ratio = self._ratio(log_ratio(logps, old_logps, mask), mask)  # (m, t) or (m, 1)
        per_token, shares = self._surrogate(ratio, logps, advantages, self.numbers)  # (m, t)
        tokens = inputs.mask.sum()
        metrics = {name: ((share * mask).sum(), tokens) for name, share in shares.items()}
        if self._sampling_correction is not None:
            if inputs.sampling_logps is None:
                raise RuntimeError("objective.sampling_correction: the rollout engine returns no log-probabilities")
            difference = log_ratio(old_logps.detach(), inputs.sampling_logps.where(counted, 0.0), mask)
            weight = sampling_weight(difference, mask, self._sampling_correction, self._sampling_cap)
            per_token = per_token * weight
            metrics["sampling/importance_sampling_ratio/mean"] = ((weight * mask).sum(), tokens)
        if self.beta > 0:
            assert inputs.ref_logps is not None  # always given if beta > 0
            kl = self._kl(logps, inputs.ref_logps.where(counted, 0.0))
            if self._kl_correction:
                kl = kl * ratio
            per_token = per_token + self.beta * kl
            metrics["kl"] = ((kl.detach() * mask).sum(), tokens)
        loss = self._reduction(per_token, mask, counts)
        if self.entropy_weight > 0:
            assert inputs.entropy is not None  # always given if needs_entropy_gradient
            loss = loss - self.entropy_weight * token_mean(inputs.entropy, mask, counts)
        return LossOutput(loss, metrics)


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """`logps - old_logps` (m, t), zero outside the mask and clamped, so that its exp is finite everywhere."""
    return ((logps - old_logps) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The probability ratio of each token, (m, t). Source: DeepSeekMath (arXiv 2402.03300), equation 3."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The geometric mean of the ratios of each row's tokens, (m, 1). Source: GSPO (arXiv 2507.18071)."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)  # (m, 1)
    return ((log_ratio * mask).sum(dim=1, keepdim=True) / lengths).exp()


def sampling_weight(log_ratio: Tensor, mask: Tensor, correction: str, cap: float) -> Tensor:
    """Importance weights (m, t) or (m, 1) for tokens that were sampled from another distribution than the trainer's.

    log_ratio: (m, t), log-probabilities by the trainer minus those at sampling; cap: the largest weight. correction:
    token_truncate or sequence_truncate (larger weights become the cap), token_mask or sequence_mask (they become 0);
    the ratio of a sequence is the product of those of its tokens.
    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025, for truncation;
    the others are those of TRL's vllm_importance_sampling_mode.
    """
    level, _, limit = correction.partition("_")
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (m, 1)
    ratio = log_ratio.exp()
    return ratio.clamp(max=cap) if limit == "truncate" else ratio.where(ratio <= cap, 0.0)


def clip(ratio: Tensor, logps: Tensor, advantages: Tensor, numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, to be minimised: `-min(ratio A, clip(ratio, 1 - low, 1 + high) A)`.

    With `delta` the first ratio is at most delta: it bounds the loss of a bad completion that became likelier.
    ratio: (m, t) or (m, 1); advantages: (m, 1) or (m, t). Returns the surrogate, of the shape of ratio * advantages,
    and for each metric which tokens were clipped to the range, so that they have no gradient, bool of this shape.
    Source: DeepSeekMath (arXiv 2402.03300), equation 3; delta: INTELLECT-2 (arXiv 2505.07291).
    """
    lowest = 1 - numbers.epsilon_low
    highest = 1 + numbers.epsilon_high
    low = (ratio < lowest) & (advantages < 0)
    high = (ratio > highest) & (advantages > 0)
    shares = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    bounded = ratio if numbers.delta is None else ratio.clamp(max=numbers.delta)
    return -(bounded * advantages).minimum(ratio.clamp(lowest, highest) * advantages), shares


def cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE with the ratio, at most `cap`, as a weight without gradient: `-min(ratio, cap) A logp`.

    No token loses its gradient. Shapes: as for `clip`; the metric says which ratios were above the cap.
    Source: MiniMax-M1 (arXiv 2506.13585).
    """
    weight = ratio.clamp(max=numbers.cap).detach()
    return -weight * advantages * logps, {"cispo_clip_ratio": (ratio > numbers.cap) & (advantages > 0)}


def sapo(ratio: Tensor, logps: Tensor, advantages: Tensor, numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
    """A soft clip: `-(4 / tau) sigmoid(tau (ratio - 1)) A`, with `tau_positive` or `tau_negative` by the sign of A.

    Its gradient decreases smoothly as the ratio moves away from 1. Shapes: as for `clip`; it has no metrics.
    Source: SAPO (arXiv 2511.20347).
    """
    is_positive = (advantages > 0).to(advantages.dtype)
    tau = numbers.tau_negative + (numbers.tau_positive - numbers.tau_negative) * is_positive
    return -(4 / tau) * (tau * (ratio - 1)).sigmoid() * advantages, {}


def row_mean(values: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """The mean over rows of the mean over each row's tokens, (m, t) -> scalar.

    Source: DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    return ((values * mask).sum(dim=1) / lengths).sum() / max(counts.rows, 1)


def token_mean(values: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """The mean over all tokens of the batch, so that each token counts the same, (m, t) -> scalar.

    Source: DAPO (arXiv 2503.14476), section 3.3.
    """
    return (values * mask).sum() / max(counts.tokens, 1)


def constant_mean(values: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """The sum over tokens, divided by rows and the maximum length, so that no length changes the weight of a token.

    Source: Dr. GRPO (arXiv 2503.20783).
    """
    return (values * mask).sum() / (max(counts.rows, 1) * counts.max_length)


def row_sum(values: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """The mean over rows of the sum over each row's tokens, (m, t) -> scalar: long completions count for more.

    Source: RLOO (arXiv 2402.14740), where a completion is one action; LUSPO (arXiv 2602.05261).
    """
    return (values * mask).sum() / max(counts.rows, 1)


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate per token (m, t) of KL(policy || reference): `logps - ref_logps`. Unbiased, of either sign.

    As a loss on samples of the policy its gradient is 0 on average if all tokens have the same weight, and with
    `row_mean` it only rewards length: use it with kl_correction. Source: Schulman, "Approximating KL divergence".
    """
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate per token (m, t) of KL(policy || reference): `(logps - ref_logps)^2 / 2`. Biased, never negative.

    As a loss on samples of the policy its gradient is that of the KL divergence on average.
    Source: Schulman, "Approximating KL divergence".
    """
    return (logps - ref_logps).square() / 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate per token (m, t) of KL(policy || reference): `exp(x) - x - 1`, `x = ref_logps - logps`.

    Never negative, and unbiased for samples of the policy.
    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath (arXiv 2402.03300), equation 4.
    """
    x = (ref_logps - logps).clamp(max=MAX_LOG_RATIO)  # below, nothing overflows, and a clamp would end the gradient
    return x.exp() - x - 1


# The arguments of the functions of each choice, passed by position.
ARGUMENTS = {
    "advantage": ("rewards", "weights", "valid"),  # (P, G, C), (C,), (P, G, C) -> (P, G) or (P, G, T)
    "ratio": ("log_ratio", "mask"),  # (m, t), (m, t) -> (m, t) or (m, 1)
    # ratio (m, t) or (m, 1), logps (m, t), advantages (m, 1) or (m, t), Numbers -> (m, t), {metric: (m, t)}
    "surrogate": ("ratio", "logps", "advantages", "numbers"),
    "reduction": ("values", "mask", "counts"),  # (m, t), (m, t), Counts -> scalar
    "kl": ("logps", "ref_logps"),  # (m, t), (m, t) -> (m, t)
}
# The functions that a config in conf/objective/ can select by name, for each choice.
CHOICES: dict[str, dict[str, Callable[..., Any]]] = {
    "advantage": {
        "group": group_advantage,
        "batch": batch_advantage,
        "none": centered_advantage,
        "leave_one_out": leave_one_out_advantage,
        "normalize_then_sum": normalize_then_sum_advantage,
        "mean": mean_scaled_advantage,
    },
    "ratio": {"token": token_ratio, "sequence": sequence_ratio},
    "surrogate": {"clip": clip, "cispo": cispo, "sapo": sapo},
    "reduction": {"row": row_mean, "token": token_mean, "constant": constant_mean, "length": row_sum},
    "kl": {"k1": k1, "k2": k2, "k3": k3},
}


def choose(choice: str, name: str) -> Callable[..., Any]:
    """The function for a choice: the one with this name in `CHOICES`, or the one at this dotted path.

    Raises ConfigError if there is no such function, or if it does not take the arguments in `ARGUMENTS`.
    """
    key = f"objective.{choice}"
    known = CHOICES[choice]
    if isinstance(name, str) and name in known:
        return known[name]
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(f"{key}={name}: must be {' or '.join(known)}, or the dotted path of a function of your own")
    function = find_function(key, name)
    if inspect.isclass(function):
        raise ConfigError(f"{key}={name}: must be a function, not a class")
    form = f"it must have the form f({', '.join(ARGUMENTS[choice])})"
    check_call(f"{key}={name}", function, form, *ARGUMENTS[choice])
    return function


def check_choices(objective: Mapping[str, Any]) -> None:
    """Raise ConfigError if the config group `objective` selects a choice that does not exist."""
    is_own = objective.get("_target_") == f"{Objective.__module__}.{Objective.__qualname__}"
    for choice in CHOICES if is_own else ("advantage",):  # another function may give these keys other meanings
        choose(choice, objective[choice])
