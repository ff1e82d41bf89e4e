"""Problems of any table: a data set of the hub, or a folder with JSON Lines, CSV or Parquet files."""

import csv
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from grpo.config.errors import ConfigError, first_line
from grpo.data.problems import SPLITS, Problems, load_from_hub, parse_rows, read_lines
from grpo.rewards.lenient import last_boxed

MOST_CHARACTERS = 10_000_000  # of a value in a CSV file
_BOXED_WORD = re.compile(r"\\(?:boxed|fbox)\s+([^\s${}\\.,]+)")
Rows = Iterable[tuple[int, Any]]  # each with the number of its line


def load_table(
    path: str | None,
    name: str | None = None,
    *,
    question: str = "question",
    answer: str = "answer",
    id: str | None = None,
    boxed: bool = False,
    splits: Mapping[str, str] | None = None,
) -> Problems:
    r"""Load the problems of a table by the names of its columns.

    path, name: a data set of the hub and its configuration; or a folder with one file for each split, train, test and
    if wanted validation, that ends in .jsonl, .csv or .parquet. question: the column of the question, which is a text
    or a list of chat messages that ends with the user's. answer: the column of the final answer; a solution as in GSM8K
    (`#### 18`) is possible, and with `boxed` one whose answer is in its last ``\boxed{}``. id: the column of a unique
    name; null: the number of the line. splits: the names of the splits in the data set where they differ, as
    {test: validation}. The other columns are passed to the reward functions.

    Raises ConfigError with file, line and reason.
    """
    if path is None:
        raise ConfigError("data.path=null: give a data set's hub name, or a folder with train.csv and test.csv")
    columns = {"question": question, "answer": answer} | ({} if id is None else {"id": id})
    for role, column in columns.items():
        if not isinstance(column, str):
            raise ConfigError(f"data.{role}={column}: must be the name of a column")
    if not isinstance(boxed, bool):
        raise ConfigError(f"data.boxed={boxed}: must be true or false")
    if len(set(columns.values())) < len(columns):
        raise ConfigError(f"data: question, answer and id must be different columns, not {', '.join(columns.values())}")
    names = _split_names(splits or {})
    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"data.path={path} is a file; give the folder that holds it as train{folder.suffix}")
    tables = _tables(folder, names) if folder.is_dir() else _hub_tables(path, name, names)
    renamed = functools.partial(_renamed, columns=columns, boxed=boxed)
    return Problems(**{split: _problems(*table, split, renamed) for split, table in tables.items()})


def _split_names(splits: Mapping[str, str]) -> dict[str, str]:
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"data.splits.{split}: the splits are {', '.join(SPLITS)}")
    names = {split: splits.get(split, split) for split in SPLITS}
    if "validation" not in splits and names["validation"] in (names["train"], names["test"]):
        del names["validation"]  # {test: validation}: then there are none
    if len(set(names.values())) < len(names):
        raise ConfigError(f"data.splits={dict(splits)}: each split must have a name of its own")
    return names


def _problems(source: str, rows: Rows, split: str, renamed: Callable[..., Any]) -> list:
    return parse_rows(((number, renamed(row, f"{source}, line {number}")) for number, row in rows), source, split)


def _tables(folder: Path, names: Mapping[str, str]) -> dict[str, tuple[str, Rows]]:
    """The tables of a folder by split, each with the name of its file."""
    tables: dict[str, tuple[str, Rows]] = {}
    for split, name in names.items():
        files = [file for ending in READERS if (file := folder / f"{name}{ending}").is_file()]
        if len(files) > 1:
            raise ConfigError(f"data.path={folder} has {files[0].name} and {files[1].name}; remove one of them")
        if files:
            tables[split] = str(files[0]), READERS[files[0].suffix](files[0])
        elif split != "validation":
            raise ConfigError(f"data.path={folder}: there is no {name}.jsonl, {name}.csv or {name}.parquet in it")
    return tables


def _hub_tables(path: str, name: str | None, names: Mapping[str, str]) -> dict[str, tuple[str, Rows]]:
    found = load_from_hub(path, name, names, "data.path=DIR")
    return {split: (f"{path} {names[split]}", rows) for split, rows in found.items()}


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header; all values are texts, so that an answer 1.50 stays what it is."""
    before = csv.field_size_limit(MOST_CHARACTERS)  # of the process
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames or []
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise ConfigError(f"{file}, line 1: the column '{repeated}' occurs twice")
            for row in reader:
                if None in row or None in row.values():
                    raise ConfigError(f"{file}, line {reader.line_num}: the header has another number of columns")
                yield reader.line_num, row
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not encoded as UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(before)


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{file} is not a Parquet file ({first_line(error)})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, {key: str(value) if isinstance(value, Decimal) else value for key, value in row.items()}


READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": read_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _renamed(row: Any, where: str, columns: Mapping[str, str], boxed: bool) -> Any:
    """The row with `question`, `answer` and perhaps `id` in place of the columns that have these roles."""
    if not isinstance(row, dict):
        return row
    for role, column in columns.items():
        if column not in row:
            raise ConfigError(
                f"{where}: there is no column '{column}' (data.{role}); it has {', '.join(map(str, row))}"
            )
    others = {key: value for key, value in row.items() if key not in columns.values() and key not in FIELDS}
    chosen = {role: row[column] for role, column in columns.items()}
    if boxed and isinstance(chosen["answer"], str):
        others["solution"] = chosen["answer"]
        without_braces = _BOXED_WORD.findall(chosen["answer"])[-1:]  # as in a few solutions of MATH
        chosen["answer"] = last_boxed(chosen["answer"]) or next(iter(without_braces), None)
        if chosen["answer"] is None:
            raise ConfigError(rf"{where}: '{columns['answer']}' has no \boxed{{...}} (data.boxed=true)")
    return others | chosen


FIELDS = ("id", "question", "answer")  # a column with one of these names that has another role is left out
