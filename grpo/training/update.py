"""One policy update on one batch: cut into micro-batches, whose gradients add up to the whole batch's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.loss import BatchCounts, LossOutput
from grpo.batch import Completions, Prompts, split_rows
from grpo.model.logps import TokenLogps, completion_logps
from grpo.model.packed import packs


@dataclass(frozen=True)
class Batch:
    """All that an update needs to know of the B = P * G completions of a step."""

    prompts: Prompts  # P rows
    completions: Completions  # B rows
    advantages: Tensor  # (B,) float32
    ref_logps: Tensor | None = None  # (B, T); None where beta is 0
    old_logps: Tensor | None = None  # (B, T); None while the policy has not moved since it sampled

    def token_range(self, shared: bool) -> tuple[int, int]:
        """Tokens of the longest completion with its prompt, and of all, counted as `micro_batches` counts them."""
        lengths, prompts = self.completions.lengths, self.prompts.mask.sum(dim=1)
        rows = lengths + prompts[self.completions.group]
        return int(rows.max()), int(lengths.sum() + prompts.sum() if shared else rows.sum())

    def micro_batches(self, token_budget: int, shared: bool) -> list[Tensor]:
        """The rows (m,) of each part of at most so many tokens, within a group those of like length together.

        shared: whether a part reads each of its prompts once, and not once for every row.
        """
        lengths, group = self.completions.lengths, self.completions.group
        order = (group * (lengths.max() + 1) - lengths).argsort(stable=True)
        parts = split_rows(self.prompts.mask.sum(dim=1), group[order], lengths[order], token_budget, shared)
        return [order[part] for part in parts]

    def part(self, rows: Tensor) -> "MicroBatch":
        """The completions of these rows (m,), with the prompts that they answer."""
        completions = self.completions.select(rows)
        prompts, group = completions.group.unique(return_inverse=True)
        width = completions.ids.shape[1]
        return MicroBatch(
            self.prompts.take(prompts),
            replace(completions, group=group),
            self.advantages[rows],
            None if self.ref_logps is None else self.ref_logps[rows, :width],
            None if self.old_logps is None else self.old_logps[rows, :width],
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, to be written to a file."""
        tensors = {
            "prompt_ids": self.prompts.ids,
            "prompt_mask": self.prompts.mask,
            "completion_ids": self.completions.ids,
            "attention_mask": self.completions.attention_mask,
            "completion_mask": self.completions.completion_mask,
            "group": self.completions.group,
            "sampling_logps": self.completions.sampling_logps,
            "advantages": self.advantages,
            "ref_logps": self.ref_logps,
            "old_logps": self.old_logps,
        }
        # A copy of each, since a file takes no two tensors that share their memory, as the masks may.
        return {name: value.clone() for name, value in tensors.items() if value is not None}


@dataclass(frozen=True)
class MicroBatch:
    """m of a batch's completions, cut to the longest of them, t tokens."""

    prompts: Prompts  # those that are answered
    completions: Completions  # m rows
    advantages: Tensor  # (m,)
    ref_logps: Tensor | None  # (m, t)
    old_logps: Tensor | None  # (m, t)

    def logps(self, model: PreTrainedModel, temperature: float, entropy: bool = True) -> TokenLogps:
        """Log-probabilities of these completions, with gradient where it is enabled."""
        return completion_logps(model, self.prompts, self.completions, temperature, entropy)


@torch.no_grad()
def all_logps(model: PreTrainedModel, batch: Batch, temperature: float, token_budget: int) -> Tensor:
    """Log-probabilities (B, T) of the whole batch without gradient, as for the reference model."""
    result = torch.zeros(batch.completions.ids.shape, device=batch.completions.ids.device)
    for rows in batch.micro_batches(token_budget, packs(model)):
        logps = batch.part(rows).logps(model, temperature, entropy=False).logps
        result[rows, : logps.shape[1]] = logps
    return result


def accumulate_gradient(
    model: PreTrainedModel,
    objective: Callable[..., LossOutput],
    batch: Batch,
    *,
    temperature: float,
    token_budget: int,
    loss_scale: float = 1.0,
) -> tuple[dict[str, float], Tensor]:
    """Add the gradient of the whole batch's loss to what the parameters hold, a part of the batch at a time.

    At beta 0 a part whose advantages are all 0 has a gradient of 0, and is read without one, for the metrics alone.
    loss_scale: what the gradient, and not the metrics, is multiplied by.
    Returns the metrics (loss, and means over the active tokens), and the log-probabilities (B, T).
    """
    counts = BatchCounts(rows=len(batch.completions.ids), tokens=int(batch.completions.completion_mask.sum()))
    logps = torch.zeros(batch.completions.ids.shape, device=batch.completions.ids.device)
    loss: Tensor | float = 0.0
    sums: dict[str, Tensor] = {}
    parts = batch.micro_batches(token_budget, packs(model))
    teaches = [batch.ref_logps is not None or bool(batch.advantages[rows].any()) for rows in parts]
    teaches[-1] |= not any(teaches)  # the optimizer is to see a gradient, were it 0
    for rows, with_gradient in zip(parts, teaches, strict=True):
        part = batch.part(rows)
        policy, output = _evaluate(model, objective, part, counts, temperature, with_gradient)
        if not with_gradient and torch.autograd.grad(output.loss, policy.logps)[0].any():
            with_gradient = True  # this objective has more to it than advantages
            policy, output = _evaluate(model, objective, part, counts, temperature, with_gradient)
        if with_gradient:
            (output.loss * loss_scale).backward()
        logps[rows, : policy.logps.shape[1]] = policy.logps.detach()
        loss += output.loss.detach()
        for name, value in {**output.sums, "entropy": policy.entropy.sum()}.items():
            sums[name] = sums.get(name, 0.0) + value
    return {"loss": float(loss)} | {name: float(value) / counts.tokens for name, value in sums.items()}, logps


def _evaluate(
    model: PreTrainedModel,
    objective: Callable[..., LossOutput],
    part: MicroBatch,
    counts: BatchCounts,
    temperature: float,
    with_gradient: bool,
) -> tuple[TokenLogps, LossOutput]:
    """The policy's log-probabilities and their loss, which leads to the parameters, or to the former alone."""
    with torch.set_grad_enabled(with_gradient):
        policy = part.logps(model, temperature)
    policy.logps.requires_grad_()
    masks = part.completions.completion_mask
    return policy, objective(policy.logps, part.old_logps, part.ref_logps, part.advantages, masks, counts)


def apply_gradient(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    loss: float,
    max_grad_norm: float,
    loss_scale: float = 1.0,
) -> tuple[float, bool]:
    """Step the optimizer with the gradient clipped to `max_grad_norm`, unless it or the loss is not finite.

    loss_scale: what the gradient was multiplied by. Returns the gradient's norm before clipping, and whether the step
    was made. The gradient is gone after it.
    """
    if loss_scale != 1.0:
        torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], loss_scale)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return grad_norm, finite


@dataclass
class LossScale:
    """What the loss is multiplied by before its backward pass in float16, where small gradients would vanish.

    Half as much where a gradient was too large for float16, twice as much after 2000 updates in which none was
    (Micikevicius et al., arXiv 1710.03740, with the numbers of torch.amp.GradScaler).
    """

    value: float = 2.0**16
    updates: int = 0  # since it last changed

    def again(self) -> bool:
        """After an update that was not finite: whether another try is worth it, with what is set for it then."""
        if self.value <= 1:
            return False
        self.value, self.updates = self.value / 2, 0
        return True

    def updated(self) -> None:
        """Count an update that was made."""
        self.updates += 1
        if self.updates == 2000:
            self.value, self.updates = self.value * 2, 0


def learning_rate(peak: float, schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step (from 1).

    Linear warm-up from 0, then constant, or falling so that it would reach 0 one step after the last.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * factor[schedule]
