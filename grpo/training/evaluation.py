"""Held-out evaluation: greedy completions of the test problems, scored like those of the training."""

from typing import Any

import torch
from transformers import PreTrainedModel

from grpo.batch import Completions
from grpo.data.problems import Problem
from grpo.model.oom import Cut
from grpo.rewards.scoring import score
from grpo.training.experiment import Setup, score_completions


def evaluate(model: PreTrainedModel, setup: Setup, cut: Cut, step: int) -> dict[str, Any]:
    """Accuracy and mean rewards of greedy completions of the held-out problems, and each problem's outcome.

    step: how many steps the model was trained for, for the record. The result is what eval/*.json holds: accuracy
    (0 to 1; None without n), n (problems that have a value of it), reward, rewards (mean by component),
    completions/mean_length (tokens), problems (all of them; correct: None where eval.accuracy gave no value).
    """
    config, sizes = setup.config.eval, setup.sizes
    length = config.max_completion_length or sizes.max_completion_length
    sampling = setup.sampling(model, temperature=0.0, max_new_tokens=length)
    # Problems of like length together, so that little of a batch is padding.
    problems = sorted(setup.problems.test[: config.max_problems], key=lambda problem: len(problem.question))
    prompts = setup.prompt_batch(setup.conversations(problems))
    completions = setup.complete(model, prompts, sampling, cut, group_size=1, step=0)
    outcomes = []
    # Scored by as many as in a step, since that is what reward.timeout_s is meant for.
    for rows in torch.arange(len(problems)).split(sizes.batch_size * sizes.num_generations):
        outcomes += _outcomes(setup, problems, completions.select(rows))
    return {
        "step": step,
        "n": sum(o["correct"] is not None for o in outcomes),
        "accuracy": _mean([o["correct"] for o in outcomes]),
        "reward": _mean([o["reward"] for o in outcomes]),
        "rewards": {c.name: _mean([o["rewards"][c.name] for o in outcomes]) for c in setup.components},
        "completions/mean_length": _mean([o["length"] for o in outcomes]),
        "problems": outcomes,
    }


def _outcomes(setup: Setup, problems: list[Problem], completions: Completions) -> list[dict[str, Any]]:
    scored = score_completions(setup, problems, completions)
    accuracy = score([setup.accuracy], scored.prompts, scored.messages, scored.columns)
    correct = accuracy.components[setup.accuracy.name]
    return [
        {
            "id": problem.id,
            "correct": None if torch.isnan(correct[row]) else bool(correct[row]),
            "reward": scored.rewards.total[row].item(),
            "rewards": {name: _value(scores[row]) for name, scores in scored.rewards.components.items()},
            "length": int(scored.lengths[row]),
            "answer": problem.answer,
            "completion": scored.texts[row],
        }
        for row, problem in enumerate(problems[group] for group in completions.group.tolist())
    ]


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _value(score_of_row: torch.Tensor) -> float | None:
    return None if torch.isnan(score_of_row) else score_of_row.item()
