"""Training and held-out problems, from the Hugging Face hub, from JSON Lines files, or generated."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.errors import ConfigError
from grpo.data import arithmetic
from grpo.rewards.math_xml import gsm8k_answer


@dataclass(frozen=True)
class Problem:
    """A question with its final answer. `columns`: the data set's other fields, passed to reward functions."""

    id: str
    question: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problems:
    """The training problems and the held-out (test) problems of a data set."""

    train: list[Problem]
    test: list[Problem]


def load_gsm8k(path: str | None, name: str | None) -> Problems:
    """Load GSM8K from the hub (path: data set name; name: its configuration) or from a folder (see `load_jsonl`).

    Raises ConfigError if it cannot be found or reached, or if a line is malformed.
    """
    if path is None:
        raise ConfigError("data.path=null: give a data set's hub name, or a folder with train.jsonl and test.jsonl")
    if Path(path).is_dir():
        return load_jsonl(path)
    # Imported here because it takes seconds, and a local folder does not need it.
    from datasets import load_dataset

    try:
        splits = load_dataset(path, name)
    except Exception as error:  # the hub, the network and the cache each raise their own exceptions
        raise ConfigError(
            f"data.path={path} is neither a local folder nor a data set that the hub gave "
            f"({type(error).__name__}: wrong name, or no network?); give a folder that holds train.jsonl and "
            "test.jsonl with data.path=DIR"
        ) from error
    missing = [split for split in ("train", "test") if split not in splits]
    if missing:
        raise ConfigError(
            f"data.path={path} has no split '{missing[0]}' (it has {', '.join(splits)}); give a folder that holds "
            "train.jsonl and test.jsonl with data=jsonl data.path=DIR"
        )
    return Problems(
        *(_parse(enumerate(splits[split], start=1), f"{path} {split}", split) for split in ("train", "test"))
    )


def load_jsonl(path: str | None, name: str | None = None) -> Problems:
    """Load `path`/train.jsonl and `path`/test.jsonl: one JSON object per line, with `question` and `answer`.

    `answer` is the final answer, or a GSM8K-style solution that ends in `#### answer`. `id` is optional.
    Raises ConfigError with file, line and reason.
    """
    if path is None:
        raise ConfigError("data=jsonl needs data.path=DIR: a folder that holds train.jsonl and test.jsonl")
    files = {split: Path(path) / f"{split}.jsonl" for split in ("train", "test")}
    for file in files.values():
        if not file.is_file():
            raise ConfigError(
                f"data.path={path}: there is no {file.name} in it (train.jsonl and test.jsonl are needed)"
            )
    return Problems(*(_parse(_read_lines(file), str(file), split) for split, file in files.items()))


def load_arithmetic(path: None = None, name: None = None) -> Problems:
    """Load the problems of `grpo.data.arithmetic`. Raises ConfigError if `path` or `name` is given."""
    if path is not None or name is not None:
        raise ConfigError(f"data.path={path}: data=arithmetic generates its own problems; for a folder add data=jsonl")
    return Problems(
        *(_parse(enumerate(arithmetic.problems(split), start=1), "arithmetic", split) for split in ("train", "test"))
    )


def _read_lines(file: Path) -> Iterable[tuple[int, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number}: not JSON ({error})") from None


def _parse(rows: Iterable[tuple[int, Any]], source: str, split: str) -> list[Problem]:
    problems: dict[str, Problem] = {}
    for number, row in rows:
        where = f"{source}, line {number}"
        if not isinstance(row, dict):
            raise ConfigError(f'{where}: must be an object such as {{"question": ..., "answer": ...}}')
        for key in ("question", "answer"):
            if not isinstance(row.get(key), str | int | float) or not str(row[key]).strip():
                raise ConfigError(f"{where}: '{key}' is missing or empty")
        problem = _problem(row, f"{split}-{number}", where)
        if problem.id in problems:
            raise ConfigError(f"{where}: the id '{problem.id}' was used before")
        problems[problem.id] = problem
    if not problems:
        raise ConfigError(f"{source} holds no problem")
    return list(problems.values())


def _problem(row: dict[str, Any], default_id: str, where: str) -> Problem:
    columns = {key: value for key, value in row.items() if key not in ("id", "question", "answer")}
    answer = str(row["answer"]).strip()
    if "####" in answer:
        columns["solution"] = answer
        try:
            answer = gsm8k_answer(answer)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    return Problem(str(row.get("id", default_id)), str(row["question"]).strip(), answer, columns)
