"""Completions as text, with their rewards and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import TrainerState

from grpo.batch import Completions
from grpo.data.problems import Problem
from grpo.data.prompts import Messages
from grpo.rewards.scoring import Rewards, score
from grpo.training.experiment import PROBLEM_FIELDS, Experiment


@dataclass(frozen=True)
class ScoredCompletions:
    """B completions as text, with their rewards."""

    texts: list[str]
    rewards: Rewards
    columns: dict[str, list]  # the problems' columns, one entry per completion
    trainer_state: TrainerState  # for reward functions that use it
    prompts: list[Messages]  # one per completion
    messages: list[Messages]  # the completions as assistant messages
    lengths: Tensor  # (B,) int64, tokens including the end of sequence


def score_completions(
    experiment: Experiment, problems: Sequence[Problem], completions: Completions, stop_ids: Sequence[int], step: int
) -> ScoredCompletions:
    """Decode completions, where `completions.group` indexes `problems`, and score them with every component.

    step: number of completed steps.
    """
    lengths = completions.lengths.cpu()
    ids = completions.ids.cpu()
    texts = experiment.texts(completions, stop_ids)
    of_row = [problems[group] for group in completions.group.tolist()]
    prompts = experiment.conversations(of_row)
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [problem.columns.get(name) for problem in of_row] for name in experiment.column_names}
    for name in PROBLEM_FIELDS:
        columns[name] = [getattr(problem, name) for problem in of_row]
    columns |= completions.columns
    columns["completion_ids"] = [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    state = _trainer_state(experiment, step)
    rewards = score(experiment.components, prompts, replies, columns, state)
    return ScoredCompletions(texts, rewards, columns, state, prompts, replies, lengths)


def _trainer_state(experiment: Experiment, step: int) -> TrainerState:
    """The progress of training in the form that TRL passes to reward functions."""
    grpo = experiment.config.grpo
    epoch = step * experiment.sizes.batch_size / max(1, len(experiment.problems.train))
    return TrainerState(global_step=step, max_steps=grpo.num_iterations * grpo.num_steps, epoch=epoch)


def compute_advantages(experiment: Experiment, scored: ScoredCompletions, width: int) -> Tensor:
    """The advantages of a whole batch, (B,) or (B, T); width: T. Raises RuntimeError for another shape."""
    values = scored.rewards.groups(experiment.sizes.num_generations)  # (P, G, C)
    valid = ~values.isnan()
    advantages = experiment.advantage(values.where(valid, 0.0), scored.rewards.weights, valid)
    if advantages.shape not in (values.shape[:2], (*values.shape[:2], width)):
        name = experiment.config.objective["advantage"]
        raise RuntimeError(
            f"objective.advantage={name} returned the shape {tuple(advantages.shape)}; it must be "
            f"{tuple(values.shape[:2])}, or have the {width} tokens of the longest completion as a third dimension"
        )
    return advantages.flatten(0, 1)
