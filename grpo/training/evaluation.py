"""Held-out evaluation: greedy completions of the test problems, scored as in training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from grpo.batch import Completions
from grpo.config.errors import ConfigError
from grpo.counter_rng import group_keys
from grpo.data.problems import Problem
from grpo.rewards.scoring import score
from grpo.rollout.engine import RolloutEngine, Sampling, sample_completions
from grpo.training.experiment import Experiment
from grpo.training.metrics import completion_rows
from grpo.training.scored_completions import score_completions


def evaluate(engine: RolloutEngine, sampling: Sampling, experiment: Experiment, step: int) -> dict[str, Any]:
    """Accuracy and mean rewards of greedy completions of the held-out problems, and each problem's outcome.

    sampling: the parameters of training; here the temperature is 0, eval.max_completion_length applies, and
    rollout.min_new_tokens does not. step: number of steps that the model was trained for, stored in the result.
    Returns the content of eval/*.json: step, n (number of problems with a value of accuracy), missing (number of those
    without), accuracy (0 to 1, over the n problems; None if n is 0), reward, rewards (mean of each component),
    completions/mean_length (tokens), problems (the rows of `completion_rows` with `correct`, None where eval.accuracy
    gave no value, and `length` in tokens).
    """
    config = experiment.config.eval
    sizes = experiment.sizes
    length = config.max_completion_length or sizes.max_completion_length
    greedy = replace(sampling, temperature=0.0, max_new_tokens=length, min_new_tokens=0)
    # Sorted by length, so that batches contain little padding.
    problems = sorted(experiment.problems.test[: config.max_problems], key=lambda problem: len(problem.question))
    if not problems:
        raise ConfigError("data has no held-out problems to evaluate on; give data.path a folder with a test.jsonl")
    prompts = experiment.prompts(experiment.conversations(problems))
    keys = group_keys(experiment.config.seed, 0, np.arange(len(problems)), group_size=1)
    completions = sample_completions(engine, prompts, greedy, group_size=1, keys=keys)
    outcomes = []
    # Scored in parts of the size of a training batch, since reward.timeout_s is meant for that many completions.
    for rows in torch.arange(len(problems)).split(sizes.batch_size * sizes.num_generations):
        outcomes += _outcomes(experiment, problems, completions.select(rows), sampling.stop_ids, step)
    missing = sum(o["correct"] is None for o in outcomes)
    return {
        "step": step,
        "n": len(outcomes) - missing,
        "missing": missing,
        "accuracy": _mean([o["correct"] for o in outcomes]),
        "reward": _mean([o["reward"] for o in outcomes]),
        "rewards": {c.name: _mean([o[f"rewards/{c.name}"] for o in outcomes]) for c in experiment.components},
        "completions/mean_length": _mean([o["length"] for o in outcomes]),
        "problems": outcomes,
    }


def _outcomes(
    experiment: Experiment, problems: list[Problem], completions: Completions, stop_ids: Sequence[int], step: int
) -> list[dict[str, Any]]:
    scored = score_completions(experiment, problems, completions, stop_ids, step)
    accuracy = score([experiment.accuracy], scored.prompts, scored.messages, scored.columns, scored.trainer_state)
    correct = accuracy.components[experiment.accuracy.name].tolist()
    rows = completion_rows(problems, scored, completions.group)
    return [
        {**row, "correct": None if math.isnan(value) else bool(value), "length": length}
        for row, value, length in zip(rows, correct, scored.lengths.tolist(), strict=True)
    ]


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
