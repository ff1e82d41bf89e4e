"""Completions as text, with their rewards and advantages."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import Tensor

from grpo.batch import Completions
from grpo.config.checks import complete_sizes
from grpo.config.schema import Config
from grpo.data.problems import Problem
from grpo.data.prompts import Messages, messages
from grpo.rewards.scoring import RewardComponent, Rewards, score
from grpo.training.experiment import PROBLEM_FIELDS, Experiment

# The other fields of transformers' TrainerState, with its defaults.
OTHER_PROGRESS: dict[str, Any] = {
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), 500),
    **dict.fromkeys(("num_train_epochs", "num_input_tokens_seen", "total_flos"), 0),
    **dict.fromkeys(("best_metric", "best_global_step", "best_model_checkpoint", "train_batch_size")),
    **dict.fromkeys(("trial_name", "trial_params")),
    **dict.fromkeys(("is_local_process_zero", "is_world_process_zero"), True),
    "is_hyper_param_search": False,
    "log_history": [],
    "stateful_callbacks": {},
}


@dataclass(frozen=True)
class ScoredCompletions:
    """B completions as text, with their rewards."""

    texts: list[str]
    rewards: Rewards
    columns: dict[str, list]  # the problems' columns, one entry per completion
    trainer_state: SimpleNamespace  # for reward functions that use it
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
    of_row = [problems[group] for group in completions.group.tolist()]
    extra = dict(completions.columns)
    extra["completion_ids"] = [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    texts = experiment.texts(completions, stop_ids)
    state = trainer_state(experiment.config, len(experiment.problems.train), step)
    return score_texts(
        experiment.components, experiment.config, experiment.column_names, of_row, texts, lengths, state, extra
    )


def score_texts(
    components: Sequence[RewardComponent],
    config: Config,
    column_names: Sequence[str],
    problems: Sequence[Problem],
    texts: list[str],
    lengths: Tensor,
    state: SimpleNamespace,
    extra: Mapping[str, list] = MappingProxyType({}),
) -> ScoredCompletions:
    """Score B completions of B problems, given as texts. extra: further columns; the others: see ScoredCompletions."""
    prompts = [messages(problem.question, config.data, problem.turns) for problem in problems]
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [problem.columns.get(name) for problem in problems] for name in column_names}
    for name in PROBLEM_FIELDS:
        columns[name] = [getattr(problem, name) for problem in problems]
    columns |= extra
    rewards = score(components, prompts, replies, columns, state)
    return ScoredCompletions(texts, rewards, columns, state, prompts, replies, lengths)


def trainer_state(config: Config, num_problems: int, step: int) -> SimpleNamespace:
    """The progress of training with the fields of transformers' TrainerState, which TRL passes to reward functions.

    That class is not used, since importing it takes a second. num_problems: training problems; step: number of
    completed steps.
    """
    grpo = config.grpo
    epoch = step * complete_sizes(config).batch_size / max(1, num_problems)
    return SimpleNamespace(
        epoch=epoch,
        global_step=step,
        max_steps=grpo.num_iterations * grpo.num_steps,
        **{name: copy.copy(default) for name, default in OTHER_PROGRESS.items()},
    )


def compute_advantages(experiment: Experiment, scored: ScoredCompletions, width: int) -> Tensor:
    """The advantages of a whole batch, (B,) or (B, T); width: T. Raises RuntimeError for another shape."""
    size = experiment.sizes.num_generations
    advantages = group_advantages(experiment.advantage, scored.rewards, size)
    groups = (len(scored.texts) // size, size)
    if advantages.shape not in (groups, (*groups, width)):
        name = experiment.config.objective["advantage"]
        raise RuntimeError(
            f"objective.advantage={name} returned the shape {tuple(advantages.shape)}; it must be "
            f"{groups}, or have the {width} tokens of the longest completion as a third dimension"
        )
    return advantages.flatten(0, 1)


def pass_rates(experiment: Experiment, scored: ScoredCompletions) -> list[float]:
    """For each group the share of its completions that eval.accuracy counts as right; NaN if it can grade none."""
    graded = score([experiment.accuracy], scored.prompts, scored.messages, scored.columns, scored.trainer_state).total
    right = graded.ne(0).to(graded.dtype).where(~graded.isnan(), graded)
    return right.view(-1, experiment.sizes.num_generations).nanmean(dim=1).tolist()


def group_advantages(advantage: Callable[[Tensor, Tensor, Tensor], Tensor], rewards: Rewards, size: int) -> Tensor:
    """The advantages of groups of `size` completions, (P, G) or (P, G, T), as the function returns them."""
    values = rewards.groups(size)  # (P, G, C)
    valid = ~values.isnan()
    return advantage(values.where(valid, 0.0), rewards.weights, valid)
