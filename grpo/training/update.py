"""One policy update on one batch, split into micro-batches whose gradients add up to the whole batch's."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.objective import Counts, LossInputs, LossOutput, ObjectiveFunction
from grpo.batch import Completions, Prompts, split_rows
from grpo.metric_table import METRICS
from grpo.model.lm_head import Entropy
from grpo.model.logps import TokenLogps, completion_logps
from grpo.model.packed import supports_packing
from grpo.runs.files import check_record

# Columns of every metrics row, for any objective; the objective may report the other metrics of the table.
RESERVED = {metric.name for metric in METRICS if metric.origin != "objective"}
RESERVED_PREFIXES = ("rewards/", "timing_s/", "perf/", "validation/", "test/")


@dataclass(frozen=True)
class Batch:
    """The inputs of an update: the B completions of a step, or some of them."""

    prompts: Prompts  # P rows
    completions: Completions  # B rows
    advantages: Tensor  # (B,) float32, or (B, T)
    ref_logps: Tensor | None = None  # (B, T); None if beta is 0
    old_logps: Tensor | None = None  # (B, T); None while the policy has not changed since it sampled

    def counts(self, max_length: int) -> Counts:
        """The counts that the loss of this batch is divided by; max_length: maximum tokens of a completion."""
        return Counts(
            rows=int(self.completions.completion_mask.any(dim=1).sum()),
            tokens=int(self.completions.completion_mask.sum()),
            groups=len(self.prompts.ids),
            max_length=max_length,
        )

    def without(self, rows: Tensor) -> "Batch":
        """The batch where no token of these completions, (B,) bool, counts in the loss."""
        mask = self.completions.completion_mask * ~rows[:, None]
        return replace(self, completions=replace(self.completions, completion_mask=mask))

    def pruned(self, per_group: int) -> "Batch":
        """Of each group the completions with the largest absolute advantages; of equal ones the first.

        Of advantages by token, the largest of a completion counts. Completions without a token that counts in the loss
        come last. Source: CPPO (arXiv 2503.22342).
        """
        mask = self.completions.completion_mask
        by_token = self.advantages if self.advantages.dim() == 2 else self.advantages[:, None].expand_as(mask)
        size = by_token.abs().where(mask.bool(), -1.0).amax(dim=1)  # (B,)
        groups = size.view(len(self.prompts.ids), -1)  # (P, G)
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :per_group].sort(dim=1).values  # (P, k)
        first = torch.arange(len(groups), device=best.device)[:, None] * groups.shape[1]  # (P, 1)
        return self.select((first + best).flatten())

    def counted(self) -> "Batch":
        """The completions that have a token that counts in the loss, or the first one if none has."""
        rows = self.completions.completion_mask.any(dim=1).nonzero().squeeze(1)
        return self.select(rows if len(rows) else torch.zeros(1, dtype=torch.int64, device=rows.device))

    def token_range(self, shared: bool) -> tuple[int, int]:
        """Tokens of the longest completion with its prompt, and of all rows, counted as in `micro_batches`."""
        lengths = self.completions.lengths
        prompts = self.prompts.mask.sum(dim=1)
        rows = lengths + prompts[self.completions.group]
        return int(rows.max()), int(lengths.sum() + prompts.sum() if shared else rows.sum())

    def micro_batches(self, token_budget: int, shared: bool) -> list[Tensor]:
        """Row indices (m,) of micro-batches of at most `token_budget` tokens; the rows of a group are sorted by length.

        shared: whether a micro-batch processes each of its prompts once instead of once per row.
        """
        lengths = self.completions.lengths
        group = self.completions.group
        order = (group * (lengths.max() + 1) - lengths).argsort(stable=True)  # (B,), by group, longest first
        parts = split_rows(self.prompts.mask.sum(dim=1), group[order], lengths[order], token_budget, shared)
        return [order[part] for part in parts]

    def select(self, rows: Tensor) -> "Batch":
        """The completions of these rows (m,) int64, padded to the longest of them, with their prompts."""
        completions = self.completions.select(rows)
        prompts, group = self.prompts.take(completions.group)
        width = completions.ids.shape[1]
        return Batch(
            prompts,
            replace(completions, group=group),
            self.advantages[rows] if self.advantages.dim() == 1 else self.advantages[rows, :width],
            None if self.ref_logps is None else self.ref_logps[rows, :width],
            None if self.old_logps is None else self.old_logps[rows, :width],
        )

    def logps(self, model: PreTrainedModel, temperature: float, entropy: Entropy = "value") -> TokenLogps:
        """Log-probabilities of these completions, with gradient if it is enabled."""
        return completion_logps(model, self.prompts, self.completions, temperature, entropy)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, to be written to a file."""
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
        # Copies, since safetensors does not store tensors that share memory, as the masks may.
        return {name: value.contiguous().clone() for name, value in tensors.items() if value is not None}


@torch.no_grad()
def all_logps(model: PreTrainedModel, batch: Batch, temperature: float, token_budget: int) -> Tensor:
    """Log-probabilities (B, T) of the whole batch without gradient, used for the reference model."""
    result = torch.zeros(batch.completions.ids.shape, device=batch.completions.ids.device)
    for rows in batch.micro_batches(token_budget, supports_packing(model)):
        logps = batch.select(rows).logps(model, temperature, entropy="none").logps
        result[rows, : logps.shape[1]] = logps
    return result


@dataclass(frozen=True)
class Gradient:
    """Results of accumulating the gradient of some completions. Losses and metrics of a batch's parts add up."""

    loss: float
    metrics: dict[str, tuple[float, float]]  # name -> (sum, weight); the metric is their quotient
    logps: Tensor  # (B, T) float32, log-probabilities before the update; 0 for completions without a pass
    passed: Tensor  # (B,) bool, whether the policy computed a completion

    def means(self) -> dict[str, float]:
        """The loss and the mean of each metric; NaN for a metric whose weight is 0."""
        means = {name: total / weight if weight else math.nan for name, (total, weight) in self.metrics.items()}
        return {"loss": self.loss, **means}


def accumulate_gradient(
    model: PreTrainedModel,
    objective: ObjectiveFunction,
    batch: Batch,
    counts: Counts,
    *,
    temperature: float,
    token_budget: int,
    loss_scale: float = 1.0,
) -> Gradient:
    """Add the gradient of a batch's loss to the parameters' `grad`, one micro-batch at a time.

    counts: of the whole batch, of which `batch` may be a part. loss_scale: a factor of the gradient only.
    If the objective says that completions with an advantage of 0 have no part in the loss (`needs_advantage`), the
    policy does not compute them, and they have no part in the metrics. Of another objective without a KL term and an
    entropy bonus, a micro-batch whose advantages are all 0 has a forward pass only, unless its loss has a gradient.
    """
    computed = _computed_rows(objective, batch)  # (n,)
    whole = batch
    batch = batch.select(computed) if len(computed) < len(batch.advantages) else batch
    all_rows = batch.micro_batches(token_budget, supports_packing(model))
    always = batch.ref_logps is not None or needs_entropy_gradient(objective)
    has_signal = [always or bool(batch.advantages[rows].any()) for rows in all_rows]
    has_signal[-1] |= not any(has_signal)  # so that the optimizer always gets a gradient
    logps = torch.zeros(whole.completions.ids.shape, device=whole.completions.ids.device)  # (B, T)
    passed = torch.zeros(len(logps), dtype=torch.bool, device=logps.device)
    passed[computed] = True
    loss: Tensor | float = 0.0
    sums: dict[str, tuple[Tensor | float, Tensor | int]] = {}
    for rows, with_gradient in zip(all_rows, has_signal, strict=True):
        micro_batch = batch.select(rows)
        inputs, output = compute_loss(model, objective, micro_batch, counts, temperature, with_gradient)
        if not with_gradient and _has_gradient(output.loss, inputs.logps):
            with_gradient = True  # the loss has a gradient even with advantages of 0
            inputs, output = compute_loss(model, objective, micro_batch, counts, temperature, with_gradient)
        if with_gradient and output.loss.requires_grad:
            (output.loss * loss_scale).backward()
        logps[computed[rows], : inputs.logps.shape[1]] = inputs.logps.detach()
        loss += output.loss.detach()
        assert inputs.entropy is not None  # `compute_loss` requests it
        entropy = inputs.entropy.detach() * inputs.mask
        for name, (value, weight) in {**output.metrics, "entropy": (entropy.sum(), inputs.mask.sum())}.items():
            total, total_weight = sums.get(name, (0.0, 0))
            sums[name] = total + value, total_weight + weight
    return Gradient(
        loss=float(loss),
        metrics={name: (float(total), float(weight)) for name, (total, weight) in sums.items()},
        logps=logps,
        passed=passed,
    )


def _computed_rows(objective: ObjectiveFunction, batch: Batch) -> Tensor:
    """The completions (n,) int64 that the policy computes, at least one, so that the optimizer gets a gradient."""
    everything = torch.arange(len(batch.advantages), device=batch.advantages.device)
    if not getattr(objective, "needs_advantage", False):
        return everything
    rows = batch.advantages.reshape(len(everything), -1).any(dim=1).nonzero().squeeze(1)
    return rows if len(rows) else everything[:1]


def needs_entropy_gradient(objective: ObjectiveFunction) -> bool:
    """Whether an objective says that `LossInputs.entropy` must have a gradient."""
    function = getattr(objective, "func", objective)  # of a partial, which the settings of a function make
    return bool(getattr(function, "needs_entropy_gradient", False))


def _has_gradient(loss: Tensor, logps: Tensor) -> bool:
    if not loss.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(loss, logps, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def compute_loss(
    model: PreTrainedModel,
    objective: ObjectiveFunction,
    batch: Batch,
    counts: Counts,
    temperature: float,
    with_gradient: bool,
) -> tuple[LossInputs, LossOutput]:
    """The loss of a micro-batch. Returns the inputs and the output of the objective.

    with_gradient: whether the gradient flows to the parameters instead of only to `LossInputs.logps`.
    """
    with torch.set_grad_enabled(with_gradient):
        policy = batch.logps(model, temperature, "gradient" if needs_entropy_gradient(objective) else "value")
    policy.logps.requires_grad_()
    inputs = LossInputs(
        logps=policy.logps,
        mask=batch.completions.completion_mask,
        advantages=batch.advantages,
        group=batch.completions.group,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        sampling_logps=batch.completions.sampling_logps,
        entropy=policy.entropy,
    )
    output = objective(inputs, counts)
    if not isinstance(output, LossOutput):
        raise RuntimeError(f"the objective returned {type(output).__name__}; it must return a LossOutput")
    for name in output.metrics:
        if name in RESERVED or name.startswith(RESERVED_PREFIXES):
            raise RuntimeError(f"the objective's metric '{name}' is one of the suite's; give it another name")
    return inputs, output


def apply_gradient(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    loss: float,
    max_grad_norm: float,
    loss_scale: float = 1.0,
) -> tuple[float, bool]:
    """Step the optimizer with the gradient clipped to `max_grad_norm`, unless it or the loss is not finite.

    loss_scale: factor by which the gradient was multiplied. Returns the gradient's norm before clipping, and whether
    the optimizer took the step. The gradients are None afterwards.
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
    """The factor of the loss in a float16 backward pass, without which small gradients would underflow.

    Halved if a gradient overflows float16, doubled after 2000 updates without an overflow
    (Micikevicius et al., arXiv 1710.03740, with the numbers of torch.amp.GradScaler).
    """

    value: float = 2.0**16
    updates: int = 0  # since the value last changed

    @classmethod
    def restored(cls, record: dict[str, Any]) -> "LossScale":
        """The scale that a checkpoint stores. Raises FileError if it is damaged."""
        types = {"value": float, "updates": int}
        check_record(record, types, "the checkpoint's loss_scale", needed=types)
        return cls(**{name: record[name] for name in types})

    def reduce(self) -> bool:
        """Halve the scale after an update that was not finite and return True; return False if it is 1 or less."""
        if self.value <= 1:
            return False
        self.value = self.value / 2
        self.updates = 0
        return True

    def count_update(self) -> None:
        """Count a completed update, and double the scale when it is due."""
        self.updates += 1
        if self.updates == 2000:
            self.value = self.value * 2
            self.updates = 0


def learning_rate(peak: float, schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of a step (from 1).

    Linear warm-up from 0, then constant, or decaying such that it would reach 0 one step after the last.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    done = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * factor[schedule]
