"""Generated problems of reasoning-gym (extra reasoning-gym) by task and difficulty.

Source: Stojanovski et al., arXiv 2505.24760.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from grpo.config.errors import ConfigError
from grpo.data.problems import Problems, parse_rows
from grpo.rewards.reasoning_gym import NO_REFERENCE, RUN_CODE

UNUSABLE = {
    "composite": "it needs a list of other tasks",
    "game_of_life_halting": "its scorer counts any text as the answer True (reasoning-gym 0.1.25)",
}
# Some tasks choose from sets of texts, whose order differs between processes with different seeds of Python's hashes.
_GENERATE = """
import sys
sys.path[:] = sys.argv[1:]  # first, since the current directory may have modules of these names
import os, pickle
result = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what a task prints
task, seed, size, settings = pickle.load(sys.stdin.buffer)
try:
    import reasoning_gym
    found = list(reasoning_gym.create_dataset(task, seed=seed, size=size, **settings))
except Exception as error:
    found = f"{type(error).__name__}: {error}".splitlines()[0]
pickle.dump(found, result)
"""


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
    if task in RUN_CODE:
        raise ConfigError(f"data.task={task}: its scorer runs answers or problems as Python code; choose another task")
    if task in UNUSABLE:
        raise ConfigError(f"data.task={task}: {UNUSABLE[task]}; choose another task")
    for key, value, least in (("train_size", train_size, 1), ("test_size", test_size, 0), ("task_seed", task_seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"data.{key}={value}: must be an integer of {least} or more")
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"data.settings={settings}: must be arguments of the task by name, such as {{max_terms: 3}}")
    if settings and "data_file" in settings:
        raise ConfigError("data.settings.data_file: only the texts of reasoning-gym itself are used")
    rows = _rows(task, task_seed, dict(settings or {}), train_size + test_size)
    problems = parse_rows(enumerate(rows, start=1), f"reasoning-gym {task}", task)
    return Problems(problems[test_size:], problems[:test_size])


def _rows(task: str, seed: int, settings: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """`count` rows with different questions."""
    found = 0
    questions = set()
    size = 2 * count  # enough unless many questions are equal
    for entry in _generated(task, seed, size, settings):
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


def _generated(task: str, seed: int, size: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a task, generated in a process in which the hashes of texts have a fixed seed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError('data=reasoning_gym: reasoning_gym is not installed; pip install -e ".[reasoning-gym]"')
    done = subprocess.run(
        [sys.executable, "-c", _GENERATE, *sys.path],
        input=pickle.dumps((task, seed, size, settings)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode != 0:
        raise ConfigError(f"data.task={task}: generating its problems failed with exit code {done.returncode}")
    found = pickle.loads(done.stdout)
    if isinstance(found, str):
        given = f" with data.settings={settings}" if settings else ""
        raise ConfigError(f"data.task={task}{given}: {found}")
    return found
