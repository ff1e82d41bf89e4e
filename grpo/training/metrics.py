"""The metrics row and the completions of a step, under the usual names (those of TRL if it has one)."""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo.algorithm.advantage import comparable_reward, equal_groups, group_std
from grpo.batch import Completions
from grpo.data.problems import Problem
from grpo.training.scored_completions import ScoredCompletions

WEIGHTS = 64  # values of each trained tensor in `some_weights`


class Timer:
    """Seconds spent in the named parts of a step, as `timing_s/<part>`; those of equal names add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure the block."""
        started = time.perf_counter()
        yield
        name = f"timing_s/{part}"
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def reward_metrics(scored: ScoredCompletions, group_size: int) -> dict[str, float | None]:
    """Rewards of a step: total and by component. Missing values (a component that gave None) do not count."""
    rewards = scored.rewards
    values = rewards.groups(group_size)  # (P, G, C)
    groups = comparable_reward(values, rewards.weights, ~values.isnan())  # (P, G)
    row: dict[str, float | None] = {
        "reward": _finite(rewards.total.nanmean().item()),
        "reward_std": _std(rewards.total),
        "reward_group_std": _finite(group_std(groups).nanmean().item()),
        "frac_reward_zero_std": equal_groups(groups).float().mean().item(),
    }
    for name, component in rewards.components.items():
        row[f"rewards/{name}/mean"] = _finite(component.nanmean().item())
        row[f"rewards/{name}/std"] = _std(component)
    return row


def _std(values: Tensor) -> float | None:
    """Standard deviation (ddof=1) of the values (n,) that are not NaN; None if there are fewer than two."""
    return _finite(group_std(values[None]).item())


def completion_metrics(completions: Completions, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """Lengths in tokens, the share truncated at the limit, and a digest of all sampled tokens."""
    lengths = completions.lengths
    return {
        "completions/mean_length": lengths.float().mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1.0 - ended(completions, stop_ids).float().mean().item(),
        "digest/completions": completions_digest(completions),
    }


def ended(completions: Completions, stop_ids: tuple[int, ...]) -> Tensor:
    """Which completions reached an end-of-sequence token, (B,) bool."""
    stop = torch.isin(completions.ids, torch.tensor(stop_ids, device=completions.ids.device))
    return (stop & completions.attention_mask.bool()).any(dim=1)


def completions_digest(completions: Completions) -> str:
    """SHA-256 (first 16 hex digits) over the tokens of each completion in order, without padding."""
    sha = hashlib.sha256()
    for ids, length in zip(completions.ids.cpu(), completions.lengths.tolist(), strict=True):
        sha.update(length.to_bytes(4, "little") + ids[:length].numpy().tobytes())
    return sha.hexdigest()[:16]


def evaluation_metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of an evaluation that are plotted over training, as <split>/accuracy and so on."""
    numbers = {key: result[key] for key in ("accuracy", "reward", "completions/mean_length")}
    numbers |= {f"rewards/{key}": value for key, value in result["rewards"].items()}
    return {f"{result['split']}/{key}": value for key, value in numbers.items()}


def sampling_metrics(completions: Completions, logps: Tensor) -> dict[str, float | None]:
    """Differences between sampling and training in the log-probabilities of the same tokens, in nats.

    logps: (B, T), from the training pass before the first update. Empty if the engine returned no log-probabilities.
    """
    if completions.sampling_logps is None:
        return {}
    mask = completions.completion_mask
    difference = (logps - completions.sampling_logps).abs().where(mask.bool(), 0.0)
    values = {"mean": difference.sum() / mask.sum(), "max": difference.max()}
    return {f"sampling/logp_difference/{name}": _finite(value.item()) for name, value in values.items()}


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean of each metric over those of a step's `mu` updates that have it; None if one was not finite."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: _finite(sum(each) / len(each)) for name, each in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def completion_rows(problems: list[Problem], scored: ScoredCompletions, group: Tensor) -> list[dict[str, Any]]:
    """B completions with their problems and rewards, as samples/*.jsonl, eval/*.json and W&B's table have them.

    group: (B,), index of each completion's problem. A missing reward is None.
    """
    rows = []
    for b, place in enumerate(group.tolist()):
        problem = problems[place]
        rewards = {name: values[b].item() for name, values in scored.rewards.components.items()}
        rows.append(
            {
                "problem_id": problem.id,
                "prompt": scored.prompts[b][-1]["content"],
                "completion": scored.texts[b],
                "answer": problem.answer,
                **{f"rewards/{name}": _finite(value) for name, value in rewards.items()},
                "reward": _finite(scored.rewards.total[b].item()),
            }
        )
    return rows


def some_weights(model: nn.Module) -> Tensor:
    """A copy of at most `WEIGHTS` evenly spaced values of each trained tensor of a model, (n,) float32."""
    parts = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.numel():
            values = parameter.detach().flatten()
            parts.append(values[:: -(-len(values) // WEIGHTS)].float())
    return torch.cat(parts)


def sample_rows(
    step: int, problems: list[Problem], scored: ScoredCompletions, completions: Completions, advantages: Tensor
) -> list[dict[str, Any]]:
    """The completions of a step with their advantages; of advantages (B, T) the mean over the tokens that count."""
    if advantages.dim() == 2:
        counted = completions.completion_mask.to(advantages.device)
        advantages = (advantages * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)  # (B,)
    rows = completion_rows(problems, scored, completions.group)
    numbers = zip(advantages.tolist(), scored.lengths.tolist(), strict=True)
    return [
        {"step": step, **row, "advantage": advantage, "length": length}
        for row, (advantage, length) in zip(rows, numbers, strict=True)
    ]
