"""The reward audit: the rewards of a run's sampled completions, and signs that the rewards are gamed."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from grpo.rewards.lenient import is_answer, last_number
from grpo.rewards.math_xml import TAGS, extract_answer, same_number
from grpo.runs.files import check_record, read_lines, step_of

# The types of the values that are read from a line in samples/.
SAMPLE: dict[str, Any] = {"step": int, "problem_id": str, "completion": str, "answer": str | None, "length": int}
SAMPLE |= {"reward": float | None, "advantage": float | list[float] | None}


def load_samples(run_dir: str | Path, most_steps: int | None = None) -> pd.DataFrame:
    """The completions in a run's samples/, one row each, ordered by step; empty if there are none.

    most_steps: read at most this many of the sampled steps, evenly spaced from the first to the last; None: all.
    Columns: step, problem_id, prompt, completion, answer, rewards/<component>, reward, advantage, length (tokens).
    """
    found = (file for file in Path(run_dir, "samples").glob("step_*.jsonl") if re.fullmatch(r"step_\d+", file.stem))
    files = spread(sorted(found, key=step_of), most_steps)
    # Not read by pandas, which would convert a completion that consists of digits only to a number.
    rows = [row for file in files for row in _read_rows(file)]
    columns = ["step", "problem_id", "prompt", "completion", "answer", "reward", "advantage", "length"]
    samples = pd.DataFrame(rows, columns=None if rows else columns)
    rewards = [column for column in samples if column == "reward" or column.startswith("rewards/")]
    return samples.astype(dict.fromkeys(rewards, float))  # a missing value becomes NaN


def spread(items: list[Any], most: int | None) -> list[Any]:
    """At most `most` of the items, evenly spaced from the first to the last; None: all."""
    if most is None or len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _read_rows(file: Path) -> list[dict]:
    rows = read_lines(file, SAMPLE, needed=("step", "problem_id", "completion", "reward", "length"))
    for number, row in enumerate(rows, start=1):
        check_record(row, {name: float | None for name in row if name.startswith("rewards/")}, f"{file}, line {number}")
    return rows


def components(samples: pd.DataFrame) -> list[str]:
    """The names of the reward components that have at least one value."""
    given = samples.dropna(axis=1, how="all")
    return [column.removeprefix("rewards/") for column in given if column.startswith("rewards/")]


def distribution(samples: pd.DataFrame, component: str) -> pd.DataFrame:
    """The share of completions with each value of a component: values in rows, sampled steps in columns.

    More than 8 different values are grouped into 6 intervals.
    """
    values = samples[f"rewards/{component}"].round(6)
    if values.nunique() > 8:
        values = pd.cut(values, 6, include_lowest=True).astype(str)
    return pd.crosstab(values, samples["step"], normalize="columns")


def agreement(samples: pd.DataFrame) -> pd.DataFrame:
    """The answer block against the last number, by sampled step: shares of completions, which add up to 1.

    A completion is right by its answer block if that is equal to the reference, as text or as a number, and by its last
    number if that is, wherever it stands. `last number only`: a right answer that earned nothing because of its format.
    `answer block only`: a right answer block with other numbers after it.
    """
    pairs = list(zip(samples["completion"], samples["answer"], strict=True))
    tagged = [_is(extract_answer(completion), answer) for completion, answer in pairs]
    last = [is_answer(last_number(completion), answer) for completion, answer in pairs]
    names = {
        (True, True): "both",
        (True, False): "answer block only",
        (False, True): "last number only",
        (False, False): "neither",
    }
    kind = pd.Series([names[pair] for pair in zip(tagged, last, strict=True)], index=samples.index)
    return pd.crosstab(kind, samples["step"], normalize="columns").reindex(list(names.values()), fill_value=0.0)


def signs_of_gaming(samples: pd.DataFrame) -> pd.DataFrame:
    """Shares of completions with repeated tags, text after the answer or several answers; mean length; by step."""
    text = samples["completion"]
    table = pd.DataFrame(
        {
            "a tag more than once": text.map(lambda each: any(each.count(tag) > 1 for tag in TAGS)),
            "text after the answer": text.map(lambda each: bool(_after_answer(each))),
            "several different answers": text.map(lambda each: len(set(_answers(each))) > 1),
            "tokens per completion": samples["length"].astype(float),
        }
    )
    return table.groupby(samples["step"]).mean().T


def extremes(samples: pd.DataFrame, count: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The completions with the highest and the lowest reward in the last sampled step, without duplicates."""
    last = samples[samples["step"] == samples["step"].max()].drop_duplicates("completion")
    ranked = last.sort_values("reward", ascending=False, kind="stable")
    return ranked.head(count), ranked.tail(count).iloc[::-1]


def _is(answer: str | None, reference: str) -> bool:
    return answer is not None and (answer == reference.strip() or same_number(answer, reference))


def _after_answer(text: str) -> str:
    return text.rpartition("</answer>")[2].strip() if "</answer>" in text else ""


def _answers(text: str) -> list[str]:
    """The contents of the answer blocks; split at the tags, since a regular expression takes quadratic time here."""
    blocks = (part.partition("<answer>") for part in text.split("</answer>")[:-1])
    return [content.strip() for _, tag, content in blocks if tag]
