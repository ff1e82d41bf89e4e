"""The objective of a policy update as choices, each of them a small pure function on tensors.

Shapes: m rows (completions) of t tokens, which may be a part of a batch. `mask` (m, t) is 1 where a token counts.
Log-probabilities are those of the sampled tokens, with logits divided by the sampling temperature.

conf/objective/ names each choice by its name in the tables at the end, or by the dotted path of another function.
Imports no torch, so that a launch can check these names at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo.algorithm.advantage import group_advantage
from grpo.config.errors import ConfigError
from grpo.config.instantiate import check_call, find_function

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 and bfloat16; beyond it only the sign matters


@dataclass(frozen=True)
class LossInputs:
    """What the loss of some completions is computed from. Only `logps` carries a gradient."""

    logps: Tensor  # (m, t) float32, of the policy
    mask: Tensor  # (m, t) int64, 1 where a token counts
    advantages: Tensor  # (m,) float32, or (m, t)
    group: Tensor  # (m,) int64, the same number for a prompt's completions here; they may be a part of its group
    old_logps: Tensor | None = None  # (m, t), of the policy that sampled; None: it has not changed since then
    ref_logps: Tensor | None = None  # (m, t), of the reference; None where beta is 0
    sampling_logps: Tensor | None = None  # (m, t), as the rollout engine computed them, where it does
    entropy: Tensor | None = None  # (m, t), of the policy's distribution at each token, without gradient


@dataclass(frozen=True)
class Counts:
    """Of the whole batch, known before its first micro-batch, on however many devices it is computed.

    A loss that is divided by them adds up to the same gradient however the batch is split.
    """

    rows: int  # completions
    tokens: int  # tokens that count
    groups: int  # prompts
    max_length: int  # tokens that a completion may have


@dataclass(frozen=True)
class LossOutput:
    """The share of the loss that some rows contribute, and their share of the metrics."""

    loss: Tensor  # scalar with gradient; the shares of a batch's parts add up to the batch's loss
    metrics: dict[str, tuple[Tensor, Tensor]]  # name -> scalars (sum, weight); sums over parts, then their quotient


ObjectiveFunction = Callable[[LossInputs, Counts], LossOutput]


@dataclass(frozen=True)
class Limits:
    """The numbers of the surrogates."""

    epsilon_low: float  # the ratio is clipped below 1 - epsilon_low
    epsilon_high: float  # and above 1 + epsilon_high


class Objective:
    """A surrogate of the probability ratio and the advantages, plus beta times the KL, reduced to one number."""

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
    ) -> None:
        """The choices by name (see `choose`); beta: weight of the KL. Raises ConfigError for an unknown choice."""
        self._ratio = choose("ratio", ratio)
        self._surrogate = choose("surrogate", surrogate)
        self._reduction = choose("reduction", reduction)
        self._kl = choose("kl", kl)
        self.beta = beta
        self.limits = Limits(epsilon_low, epsilon_high)

    def __call__(self, inputs: LossInputs, counts: Counts) -> LossOutput:
        """The loss of some rows of the batch that `counts` describes, and its metrics: kl and the surrogate's own."""
        counted = inputs.mask.bool()
        mask = inputs.mask.to(inputs.logps.dtype)
        # By `where` and not by a product: what stands outside the mask may be infinite.
        logps = inputs.logps.where(counted, 0.0)
        old_logps = logps.detach() if inputs.old_logps is None else inputs.old_logps.where(counted, 0.0)
        advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None]
        ratio = self._ratio(log_ratio(logps, old_logps, mask), mask)  # (m, t) or (m, 1)
        per_token, shares = self._surrogate(ratio, logps, advantages, self.limits)  # (m, t)
        tokens = inputs.mask.sum()
        metrics = {name: ((share * mask).sum(), tokens) for name, share in shares.items()}
        if self.beta > 0:
            assert inputs.ref_logps is not None  # else there is nothing to measure the distance from
            kl = self._kl(logps, inputs.ref_logps.where(counted, 0.0))
            per_token = per_token + self.beta * kl
            metrics["kl"] = ((kl.detach() * mask).sum(), tokens)
        return LossOutput(self._reduction(per_token, mask, counts), metrics)


def log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """`logps - old_logps` (m, t), zero outside the mask and clamped, so that its exp is finite everywhere."""
    return ((logps - old_logps) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The probability ratio of each token, (m, t). Source: DeepSeekMath (arXiv 2402.03300), equation 3."""
    return log_ratio.exp()


def clip(ratio: Tensor, logps: Tensor, advantages: Tensor, limits: Limits) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic surrogate, to be minimised: `-min(ratio A, clip(ratio, 1 - low, 1 + high) A)`.

    ratio (m, t) or (m, 1), advantages (m, 1) or (m, t). Returns the surrogate (m, t) and which tokens' gradient was
    clipped, (m, t) bool by metric. Source: DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    lowest = 1 - limits.epsilon_low
    highest = 1 + limits.epsilon_high
    low = (ratio < lowest) & (advantages < 0)
    high = (ratio > highest) & (advantages > 0)
    shares = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    return -(ratio * advantages).minimum(ratio.clamp(lowest, highest) * advantages), shares


def row_mean(values: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """The mean over rows of the mean over each row's tokens, (m, t) -> scalar.

    Source: DeepSeekMath (arXiv 2402.03300), equation 3.
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    return ((values * mask).sum(dim=1) / lengths).sum() / counts.rows


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate per token (m, t) of KL(policy || reference): `exp(x) - x - 1`, `x = ref_logps - logps`.

    Never negative, and unbiased for samples of the policy.
    Source: Schulman, "Approximating KL divergence" (k3); DeepSeekMath (arXiv 2402.03300), equation 4.
    """
    x = (ref_logps - logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return x.exp() - x - 1


# The arguments of each choice, which are passed by position.
ARGUMENTS = {
    "advantage": ("rewards", "weights", "valid"),  # (P, G, C), (C,), (P, G, C) -> (P, G) or (P, G, T)
    "ratio": ("log_ratio", "mask"),  # (m, t), (m, t) -> (m, t) or (m, 1)
    # (m, t) or (m, 1), (m, t), (m, 1) or (m, t), the clip range -> (m, t), {metric: (m, t)}
    "surrogate": ("ratio", "logps", "advantages", "limits"),
    "reduction": ("values", "mask", "counts"),  # (m, t), (m, t), Counts -> scalar
    "kl": ("logps", "ref_logps"),  # (m, t), (m, t) -> (m, t)
}
# What conf/objective/ can name, by choice.
CHOICES: dict[str, dict[str, Callable[..., Any]]] = {
    "advantage": {"group": group_advantage},
    "ratio": {"token": token_ratio},
    "surrogate": {"clip": clip},
    "reduction": {"row": row_mean},
    "kl": {"k3": k3},
}


def choose(choice: str, name: str) -> Callable[..., Any]:
    """The function of a choice: one of CHOICES, or by its dotted path one from elsewhere.

    Raises ConfigError where there is none, or where it does not take the arguments of its choice.
    """
    key = f"objective.{choice}"
    known = CHOICES[choice]
    if isinstance(name, str) and name in known:
        return known[name]
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(f"{key}={name}: must be {' or '.join(known)}, or the dotted path of a function of your own")
    function = find_function(key, name)
    form = f"it must have the form f({', '.join(ARGUMENTS[choice])})"
    check_call(f"{key}={name}", function, form, *ARGUMENTS[choice])
    return function


def check_choices(objective: Mapping[str, Any]) -> None:
    """Raise ConfigError for a choice of the config group `objective` that is not there."""
    is_own = objective.get("_target_") == f"{Objective.__module__}.{Objective.__qualname__}"
    for choice in CHOICES if is_own else ("advantage",):  # another function may have other keys of these names
        choose(choice, objective[choice])
