"""One policy update on one batch: cut into micro-batches, whose gradients add up to the whole batch's."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.loss import BatchCounts, LossOutput
from grpo.engine.model import CompletionBatch, PromptBatch, TokenLogps, completion_logps


@dataclass(frozen=True)
class Batch:
    """All that an update needs to know of the B = P * G completions of a step."""

    prompts: PromptBatch  # P rows
    completions: CompletionBatch  # B rows
    advantages: Tensor  # (B,) float32
    ref_logps: Tensor | None = None  # (B, T); None where beta is 0
    old_logps: Tensor | None = None  # (B, T); None while the policy has not moved since it sampled

    def rows(self, start: int, stop: int) -> "Batch":
        """The micro-batch of completions start..stop, with the prompts that they answer."""
        group_size = len(self.completions.ids) // len(self.prompts.ids)
        prompts = slice(start // group_size, (stop - 1) // group_size + 1)
        width = int(self.completions.mask[start:stop].sum(dim=1).max())  # the others' length is not paid for

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop, :width]

        return Batch(
            PromptBatch(self.prompts.ids[prompts], self.prompts.mask[prompts]),
            CompletionBatch(cut(self.completions.ids), cut(self.completions.mask)),
            self.advantages[start:stop],
            cut(self.ref_logps),
            cut(self.old_logps),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, to be written to a file."""
        nested = {"prompt": vars(self.prompts), "completion": vars(self.completions)}
        tensors = {f"{part}_{name}": value for part, group in nested.items() for name, value in group.items()}
        tensors |= {name: getattr(self, name) for name in ("advantages", "ref_logps", "old_logps")}
        return {name: value.contiguous() for name, value in tensors.items() if value is not None}

    def micro_batches(self, size: int) -> list[tuple[int, int]]:
        """The ranges of rows that cut the batch into parts of at most `size`."""
        rows = len(self.completions.ids)
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def prompt_of_row(self, start: int, stop: int) -> Tensor:
        """For the micro-batch start..stop: which of its prompts each row answers, (stop - start,) int64."""
        group_size = len(self.completions.ids) // len(self.prompts.ids)
        return torch.arange(start, stop, device=self.completions.ids.device) // group_size - start // group_size


def batch_logps(model: PreTrainedModel, batch: Batch, start: int, stop: int, temperature: float) -> TokenLogps:
    """Log-probabilities of the completions start..stop, with gradient where it is enabled."""
    part = batch.rows(start, stop)
    return completion_logps(model, part.prompts, part.completions, batch.prompt_of_row(start, stop), temperature)


@torch.no_grad()
def all_logps(model: PreTrainedModel, batch: Batch, temperature: float, micro_batch_size: int) -> Tensor:
    """Log-probabilities (B, T) of the whole batch without gradient, as for the reference model."""
    result = torch.zeros(batch.completions.ids.shape, device=batch.completions.ids.device)
    for start, stop in batch.micro_batches(micro_batch_size):
        logps = batch_logps(model, batch, start, stop, temperature).logps
        result[start:stop, : logps.shape[1]] = logps
    return result


def accumulate_gradient(
    model: PreTrainedModel,
    objective: Callable[..., LossOutput],
    batch: Batch,
    *,
    temperature: float,
    micro_batch_size: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[dict[str, float], Tensor]:
    """Put the gradient of the whole batch's loss into the parameters, in place of what they held.

    Returns the metrics (loss, and means over the active tokens), and the log-probabilities (B, T).
    """
    counts = BatchCounts(rows=len(batch.completions.ids), tokens=int(batch.completions.mask.sum()))
    logps = torch.zeros(batch.completions.ids.shape, device=batch.completions.ids.device)
    loss, sums = 0.0, {}
    model.zero_grad(set_to_none=True)
    for start, stop in batch.micro_batches(micro_batch_size):
        part = batch.rows(start, stop)
        with autocast():
            policy = batch_logps(model, batch, start, stop, temperature)
        output = objective(policy.logps, part.old_logps, part.ref_logps, part.advantages, part.completions.mask, counts)
        output.loss.backward()
        logps[start:stop, : policy.logps.shape[1]] = policy.logps.detach()
        loss += output.loss.detach()
        for name, value in {**output.sums, "entropy": policy.entropy.sum()}.items():
            sums[name] = sums.get(name, 0.0) + value
    return {"loss": float(loss)} | {name: float(value) / counts.tokens for name, value in sums.items()}, logps


def apply_gradient(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, loss: float, max_grad_norm: float
) -> tuple[float, bool]:
    """Step the optimizer with the gradient clipped to `max_grad_norm`, unless it or the loss is not finite.

    Returns the gradient's norm before clipping, and whether the step was made. The gradient is gone after it.
    """
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    if finite:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return grad_norm, finite


def learning_rate(peak: float, schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step (from 1).

    Linear warm-up from 0, then constant, or falling so that it would reach 0 one step after the last.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * factor[schedule]
