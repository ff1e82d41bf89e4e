"""Generated problems of reasoning-gym (extra reasoning-gym) by task and difficulty.

Source: Stojanovski et al., arXiv 2505.24760.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import reasoning_gym

from grpo.config.errors import ConfigError, first_line
from grpo.data.problems import Problems, parse_rows
from grpo.rewards.reasoning_gym import NO_REFERENCE

UNUSABLE = {
    "composite": "it needs a list of other tasks",
    "game_of_life_halting": "its scorer counts any text as the answer True (reasoning-gym 0.1.25)",
}


def load(
    path: None = None,
    name: None = None,
    *,
    task: str,
    train_size: int,
    test_size: int,
    task_seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Problems:
    """Generate problems of one task; training and test problems have no question in common.

    task: a name of reasoning-gym, such as chain_sum. train_size, test_size: numbers of problems. task_seed: another
    seed generates other problems. settings: the difficulty, arguments of the task's config such as {min_terms: 2}. Each
    problem has the column `metadata`, from which `grpo.rewards.reasoning_gym.score` scores an answer.

    Raises ConfigError for an unknown task or setting, and if the task has too few different questions.
    """
    if path is not None or name is not None:
        raise ConfigError(f"data.path={path}: data=reasoning_gym generates its own problems; set data.path=null")
    if task in UNUSABLE:
        raise ConfigError(f"data.task={task}: {UNUSABLE[task]}; choose another task")
    if train_size < 1 or test_size < 0:
        raise ConfigError(f"data.train_size={train_size}, data.test_size={test_size}: at least 1 problem to train on")
    rows = _rows(task, task_seed, dict(settings or {}), train_size + test_size)
    problems = parse_rows(enumerate(rows, start=1), f"reasoning-gym {task}", task)
    return Problems(problems[test_size:], problems[:test_size])


def _rows(task: str, seed: int, settings: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """`count` rows with different questions."""
    found = 0
    questions = set()
    size = 2 * count  # enough unless many questions are equal
    try:
        entries = reasoning_gym.create_dataset(task, seed=seed, size=size, **settings)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"data.task={task}: {first_line(error)}; data.settings has the arguments of the task"
        ) from error
    for entry in entries:
        if entry["question"] in questions:
            continue
        questions.add(entry["question"])
        answer = NO_REFERENCE if entry["answer"] in (None, "") else str(entry["answer"])
        yield {"question": entry["question"], "answer": answer, "metadata": entry["metadata"]}
        found += 1
        if found == count:
            return
    raise ConfigError(
        f"data.task={task}: only {found} of {size} questions are different; lower data.train_size, or make the "
        "problems more various with data.settings"
    )
