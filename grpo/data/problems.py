"""The problems of a data set, in three splits: from the Hugging Face hub, from JSON Lines files, or generated."""

import codecs
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.config.errors import ConfigError
from grpo.config.hub import is_hub_name, why_offline
from grpo.data import arithmetic
from grpo.rewards.math_xml import gsm8k_answer

SPLITS = ("train", "test", "validation")
ROLES = ("system", "user", "assistant")  # of the messages of a question that is a chat


@dataclass(frozen=True)
class Problem:
    """A question with its final answer.

    `columns`: the data set's other fields, passed to reward functions. `family`: problems with the same family are
    nearly the same, and stay in one split; empty: the problem is alone in its family. `turns`: the chat messages before
    the question, for a problem that is given as a chat. `weight`: how often it is drawn, relative to other problems.
    `part`: the name of the part of a mixture. A part is drawn with the sum of its problems' weights.
    """

    id: str
    question: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)
    family: str = ""
    turns: tuple[dict[str, str], ...] = ()
    weight: float = 1.0
    part: str = ""


@dataclass(frozen=True)
class Problems:
    """The problems of a data set, by split.

    `train`: to train on. `validation`: to choose by, for example the best checkpoint or the best arm of a sweep.
    `test`: for the result that is reported, used for no choice.
    """

    train: list[Problem]
    test: list[Problem]
    validation: list[Problem] = field(default_factory=list)

    @property
    def column_names(self) -> list[str]:
        """The names of the problems' other columns; a problem need not have all of them."""
        return sorted({name for each in [*self.train, *self.validation, *self.test] for name in each.columns})

    @property
    def split_to_choose_by(self) -> str:
        """The split by which checkpoints and arms are chosen: test if there are no validation problems."""
        return "validation" if self.validation else "test"


def load_gsm8k(path: str | None, name: str | None) -> Problems:
    """Load GSM8K from the hub (path: data set name; name: its configuration) or from a folder (see `load_jsonl`).

    Raises ConfigError if it cannot be found or reached, or if a line is malformed.
    """
    if path is None:
        raise ConfigError("data.path=null: give a data set's hub name, or a folder with train.jsonl and test.jsonl")
    if Path(path).exists():
        return load_jsonl(path)
    splits = load_from_hub(path, name, {split: split for split in SPLITS}, "data=jsonl data.path=DIR")
    return Problems(*(parse_rows(rows, f"{path} {split}", split) for split, rows in splits.items()))


def load_from_hub(
    path: str, name: str | None, splits: Mapping[str, str], instead: str
) -> dict[str, Iterable[tuple[int, Any]]]:
    """The rows of a data set on the hub with their numbers, for each of `SPLITS` that it has.

    splits: the name of each split there. instead: overrides with which a folder is used, for error messages. Raises
    ConfigError if the data set cannot be reached, or has no such split for train or test.
    """
    # Imported here because it takes seconds, and a local folder does not need it.
    from datasets import load_dataset

    try:
        found = load_dataset(path, name)
    except Exception as error:  # the hub, the network and the cache each raise their own exceptions
        if is_hub_name(path) and (reason := why_offline()) is not None:
            raise ConfigError(
                f"data.path={path} is neither a local folder nor in the cache, and {reason}: give a folder that holds "
                "train.jsonl and test.jsonl with data.path=DIR, or run once with a network: python -m grpo download "
                f"data.path={path}"
            ) from error
        raise ConfigError(
            f"data.path={path} is neither a local folder nor a data set that the hub gave "
            f"({type(error).__name__}: wrong name, or no network?); give a folder that holds train.jsonl and "
            "test.jsonl with data.path=DIR"
        ) from error
    missing = [splits[split] for split in ("train", "test") if splits[split] not in found]
    if missing:
        raise ConfigError(
            f"data.path={path} has no split '{missing[0]}' (it has {', '.join(found)}); give a folder that holds "
            f"train.jsonl and test.jsonl with {instead}"
        )
    return {split: enumerate(found[name], start=1) for split, name in splits.items() if name in found}


def load_jsonl(path: str | None, name: str | None = None) -> Problems:
    """Load `path`/train.jsonl and `path`/test.jsonl: one JSON object per line, with `question` and `answer`.

    `path`/validation.jsonl is loaded if it exists.
    `answer` is the final answer, or a GSM8K-style solution that ends in `#### answer`. `id` is optional.
    Raises ConfigError with file, line and reason.
    """
    if path is None:
        raise ConfigError("data=jsonl needs data.path=DIR: a folder that holds train.jsonl and test.jsonl")
    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"data.path={path} is a file; {NEEDED}{_conversion(folder)}")
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    for file in files.values():
        if not file.is_file():
            around = [*folder.glob("*.*"), *folder.glob("*/*.*")]
            others = sorted(each for each in around if each.suffix.lower() in READERS)
            hint = _conversion(others[0]) if others else ""
            raise ConfigError(f"data.path={path}: there is no {file.name} in it; {NEEDED}{hint}")
    if (validation := folder / "validation.jsonl").is_file():
        files["validation"] = validation
    return Problems(*(parse_rows(read_lines(file), str(file), split) for split, file in files.items()))


NEEDED = "it must be a folder with train.jsonl and test.jsonl, one object per line with question and answer"
READERS = {".csv": "read_csv", ".parquet": "read_parquet", ".json": "read_json"}  # of pandas, by a file's suffix


def _conversion(file: Path) -> str:
    """A hint how to convert a file of another format; empty for an unknown one."""
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        return ""
    call = f"pandas.{reader}({str(file)!r}).to_json('DIR/train.jsonl', orient='records', lines=True)"
    return f'; to convert it: python -c "import pandas; {call}"'


def load_arithmetic(path: None = None, name: None = None, digits: int = 2) -> Problems:
    """Load the problems of `grpo.data.arithmetic`. Raises ConfigError if `path` or `name` is given.

    digits: of the numbers that are added, from 1 to 18.
    """
    if path is not None or name is not None:
        raise ConfigError(f"data.path={path}: data=arithmetic generates its own problems; for a folder add data=jsonl")
    if isinstance(digits, bool) or not isinstance(digits, int) or not 1 <= digits <= 18:
        raise ConfigError(f"data.digits={digits}: must be an integer from 1 to 18")
    return Problems(*(_with_families(arithmetic.problems(split, digits), split) for split in ("train", "test")))


def _with_families(rows: list[dict[str, str]], split: str) -> list[Problem]:
    """The sums as problems; a + b and b + a are of one family."""
    problems = parse_rows(enumerate(rows, start=1), "arithmetic", split)
    return [replace(problem, family="+".join(sorted(problem.id.split("+")))) for problem in problems]


def read_lines(file: Path) -> Iterable[tuple[int, Any]]:
    """The objects of a file in JSON Lines with the numbers of their lines. Raises ConfigError for a malformed line."""
    try:
        stream = file.open("rb")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    with stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ConfigError(f"{file} is encoded as UTF-16; save it as UTF-8")
            if not line.strip(codecs.BOM_UTF8 + b" \t\r\n"):
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"), object_pairs_hook=_without_duplicates)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{file}, line {number}: not JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return values


def parse_rows(rows: Iterable[tuple[int, Any]], source: str, split: str) -> list[Problem]:
    """Rows with `question`, `answer` and possibly `id`, with their numbers, as problems.

    source: the name of the table, for error messages. Raises ConfigError with the number and the reason for a row that
    is not a problem, and for a table without rows.
    """
    problems: dict[str, Problem] = {}
    for number, row in rows:
        where = f"{source}, line {number}"
        if not isinstance(row, dict):
            raise ConfigError(f'{where}: must be an object such as {{"question": ..., "answer": ...}}')
        problem = _problem(row, f"{split}-{number}", where)
        if problem.id in problems:
            raise ConfigError(f"{where}: the id '{problem.id}' was used before")
        problems[problem.id] = problem
    if not problems:
        raise ConfigError(f"{source} holds no problem")
    return list(problems.values())


def _problem(row: dict[str, Any], default_id: str, where: str) -> Problem:
    columns = {key: value for key, value in row.items() if key not in ("id", "question", "answer")}
    question, turns = _conversation(row.get("question"), where)
    answer = _text(row.get("answer"), "answer", where)
    given = row.get("id")  # null means that there is none, as in exports of tables
    problem_id = default_id if given is None else _text(given, "id", where)
    if "####" in answer:
        columns["solution"] = answer
        try:
            answer = gsm8k_answer(answer)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
    return Problem(problem_id, question, answer, columns, turns=turns)


def _conversation(value: Any, where: str) -> tuple[str, tuple[dict[str, str], ...]]:
    """A question and the chat messages before it. value: the question, or a list of messages that ends with it."""
    if not isinstance(value, list):
        return _text(value, "question", where), ()
    turns = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ConfigError(f"{where}: 'question' has a message {number} without a role of {', '.join(ROLES)}")
        content = _text(message.get("content"), f"question, message {number}, content", where)
        turns.append({"role": message["role"], "content": content})
    if not turns or turns[-1]["role"] != "user":
        raise ConfigError(f"{where}: 'question' must end with a message of the user")
    return turns[-1]["content"], tuple(turns[:-1])


def _text(value: Any, key: str, where: str) -> str:
    """A value as text. Raises ConfigError if it is missing, empty, neither text nor a number, or not valid Unicode."""
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise ConfigError(f"{where}: '{key}' is missing or empty")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where}: '{key}' must be text or a number, not {json.dumps(value, default=str)[:80]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: '{key}' is {value}; it must be text or a finite number")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise ConfigError(f"{where}: '{key}' is not valid Unicode ({error.reason}: {text[error.start]!r})") from None
    return text
