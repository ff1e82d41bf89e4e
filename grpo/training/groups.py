"""The groups of a step: problems with their prompts, completions and rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo.batch import Completions, Prompts
from grpo.counter_rng import group_keys
from grpo.data.problems import Problem
from grpo.data.sampler import PromptSampler, SampledProblems
from grpo.rewards.scoring import Rewards
from grpo.rollout.engine import Sampling
from grpo.training.experiment import Experiment
from grpo.training.metrics import Timer, ended
from grpo.training.scored_completions import ScoredCompletions, compute_advantages, pass_rates, score_completions


@dataclass(frozen=True)
class Groups:
    """P problems, each with a group of G completions (B rows in all) and their rewards."""

    problems: list[Problem]
    slots: np.ndarray  # (P,) int64, see `SampledProblems`
    prompts: Prompts  # P rows
    completions: Completions  # B rows
    scored: ScoredCompletions  # B rows

    def with_signal(self, advantages: Tensor) -> list[bool]:
        """For each group whether any of its advantages, (B,) or (B, T), is not 0."""
        return advantages.reshape(len(self.problems), -1).any(dim=1).tolist()

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions, and of the prompt of each."""
        lengths = self.prompts.mask.sum(dim=1)[self.completions.group]  # (B,)
        return int(self.completions.lengths.sum() + lengths.sum())

    def replaced(self, places: Sequence[int], others: "Groups", pad_id: int) -> "Groups":
        """The groups where those at `places` are replaced by `others`, in this order."""
        chosen = list(range(len(self.problems)))
        for number, place in enumerate(places):
            chosen[place] = len(self.problems) + number
        size = len(self.completions.ids) // len(self.problems)
        rows = [group * size + row for group in chosen for row in range(size)]

        def join(one: Tensor, other: Tensor, value: int = 0) -> Tensor:
            """Rows (B, ...) of both; a second dimension is padded on the right."""
            if one.dim() > 1:
                width = max(one.shape[1], other.shape[1])
                one, other = (pad(each, (0, width - each.shape[1]), value=value) for each in (one, other))
            return torch.cat([one, other])[torch.tensor(rows, device=one.device)]

        return Groups(
            problems=_chosen([*self.problems, *others.problems], chosen),
            slots=self.slots,
            prompts=_join_prompts(self.prompts, others.prompts, chosen, pad_id),
            completions=_join_completions(self.completions, others.completions, join, pad_id),
            scored=_join_scored(self.scored, others.scored, join, rows),
        )


def sample_groups(
    experiment: Experiment,
    sampler: PromptSampler,
    sampling: Sampling,
    sample: Callable[[Prompts, Tensor], Completions],
    step: int,
    timer: Timer,
) -> tuple[Groups, list[Groups]]:
    """The groups of a step, and all that were sampled for it: `sampling.refill` replaces those without a signal.

    With `sampling.curriculum`, the sampler observes the pass rates of all of them.
    sample: samples B completions of P prompts with these keys (B, 2). step: from 1.
    Source: DAPO (arXiv 2503.14476), section 3.2, there without a limit.
    """
    size = experiment.sizes.batch_size
    pad_id = sampling.pad_id

    def sampled_for(chosen: SampledProblems, attempt: int = 0) -> Groups:
        prompts = experiment.prompts(experiment.conversations(chosen.problems))  # P prompts
        keys = group_keys(experiment.config.seed, step, chosen.slots, experiment.sizes.num_generations, attempt)
        with timer("rollout"):
            completions = sample(prompts, keys)  # B completions of T tokens at most
        with timer("reward"):
            scored = score_completions(experiment, chosen.problems, completions, sampling.stop_ids, step - 1)
        return Groups(chosen.problems, chosen.slots, prompts, completions, scored)

    groups = sampled_for(sampler.take(step, size))
    sampled = [groups]
    used = list(groups.problems)
    for attempt in range(1, experiment.config.sampling.refill + 1):
        advantages = compute_advantages(experiment, groups.scored, groups.completions.ids.shape[1])
        if experiment.config.grpo.mask_truncated_completions:
            finished = ended(groups.completions, sampling.stop_ids).to(advantages.device)  # (B,)
            advantages = (advantages.T * finished).T
        places = [place for place, has_signal in enumerate(groups.with_signal(advantages)) if not has_signal]
        if not places:
            break
        instead = sampler.take_instead(step, size, groups.slots[places].tolist(), attempt, used)
        used += instead.problems
        sampled.append(sampled_for(instead, attempt))
        groups = groups.replaced(places, sampled[-1], pad_id)
    if experiment.config.sampling.curriculum:
        with timer("reward"):
            for each in sampled:
                sampler.observe(each.problems, pass_rates(experiment, each.scored))
    return groups, sampled


def _chosen(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places]


def _join_prompts(one: Prompts, other: Prompts, chosen: list[int], pad_id: int) -> Prompts:
    width = max(one.ids.shape[1], other.ids.shape[1])
    ids, mask = (
        torch.cat([pad(each, (width - each.shape[1], 0), value=value) for each in pair])[chosen]
        for pair, value in (((one.ids, other.ids), pad_id), ((one.mask, other.mask), 0))
    )
    return Prompts(ids, mask).take(torch.arange(len(chosen), device=ids.device))[0]  # without columns of padding


def _join_completions(one: Completions, other: Completions, join: Callable[..., Tensor], pad_id: int) -> Completions:
    both_logps = one.sampling_logps is not None and other.sampling_logps is not None
    joined = Completions(
        ids=join(one.ids, other.ids, pad_id),
        attention_mask=join(one.attention_mask, other.attention_mask),
        completion_mask=join(one.completion_mask, other.completion_mask),
        group=one.group,
        sampling_logps=join(one.sampling_logps, other.sampling_logps) if both_logps else None,
    )
    # Without columns of padding; those of the rollout engine's extra values are in the scored completions.
    return joined.select(torch.arange(len(joined.ids), device=joined.ids.device))


def _join_scored(
    one: ScoredCompletions, other: ScoredCompletions, join: Callable[..., Tensor], rows: list[int]
) -> ScoredCompletions:
    components = one.rewards.components
    rewards = Rewards(
        {name: join(values, other.rewards.components[name]) for name, values in components.items()},
        one.rewards.weights,
        join(one.rewards.total, other.rewards.total),
    )
    return replace(
        one,
        texts=_chosen([*one.texts, *other.texts], rows),
        rewards=rewards,
        columns={name: _chosen([*values, *other.columns[name]], rows) for name, values in one.columns.items()},
        prompts=_chosen([*one.prompts, *other.prompts], rows),
        messages=_chosen([*one.messages, *other.messages], rows),
        lengths=join(one.lengths, other.lengths),
    )
