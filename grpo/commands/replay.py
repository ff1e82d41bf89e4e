"""Score the stored completions of a run with another reward or advantage, without a model.

python -m grpo replay run_dir=outputs/... reward.components.format.weight=0
python -m grpo replay run_dir=outputs/... objective.advantage=none
python -m grpo replay run_dir=outputs/... +reward.components.brief='{_target_: my_rewards.brief, weight: 0.5}'

All completions in samples/ are scored; samples.every=1 stores those of every step. Printed are the rewards and the
groups without a signal, stored and replayed, how often the advantages order two completions of a group in the same way,
and the completions whose advantage changes most. output=FILE writes every completion with both as JSON Lines.
"""

import inspect
import itertools
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from grpo.analysis.audit import load_samples
from grpo.commands._common import changed_config, own_arguments, run_folder_of
from grpo.config.checks import typed
from grpo.config.errors import ConfigError
from grpo.config.hub import use_cache_if_hub_is_unreachable
from grpo.config.overrides import Overrides
from grpo.config.schema import Config
from grpo.data.mixture import bind_data, paths_of
from grpo.data.problems import Problem, Problems
from grpo.data.splits import with_validation

logger = logging.getLogger(__name__)
MOST_SHOWN = 5
SHOWN_CHARACTERS = 160


@dataclass(frozen=True)
class Scores:
    """Rewards and advantages of B completions."""

    rewards: dict[str, np.ndarray]  # component -> (B,), NaN where it gave no value
    total: np.ndarray  # (B,)
    advantages: np.ndarray  # (B,)


def main(arguments: list[str]) -> None:
    """Print the comparison."""
    own, rest = own_arguments(arguments, ["run_dir", "output"])
    folder = run_folder_of(arguments)
    if folder is None:
        raise ConfigError("replay needs a run folder: python -m grpo replay run_dir=outputs/...")
    config = typed(changed_config(folder, Overrides(rest)))
    rows = sorted(load_samples(folder.path).to_dict("records"), key=lambda row: row["step"])
    if not rows:
        raise ConfigError(f"{folder.path} stores no completions: set samples.every in a run, such as samples.every=1")
    size = int(folder.frozen_config().grpo.num_generations)
    _check_rows(rows, size, folder.path)
    output = Path(own["output"]) if "output" in own else None
    if output is not None:
        _check_output(output, folder.path)
    stored, replayed = _stored(rows), _replayed(config, rows, size)
    console = Console(markup=False)
    steps = sorted({row["step"] for row in rows})
    console.print(f"{len(rows)} completions of {len(steps)} steps, from {steps[0]} to {steps[-1]}", highlight=False)
    console.print(_table(stored, replayed, size))
    same = same_order(stored.advantages, replayed.advantages, size)
    console.print(f"pairs of completions of a group in the same order: {same:.1%}", highlight=False)
    for line in _largest_changes(rows, stored, replayed):
        console.print(line, highlight=False, soft_wrap=True)
    if output is not None:
        _write(output, rows, replayed)


def _check_rows(rows: list[dict[str, Any]], size: int, run: Path) -> None:
    """Raise ConfigError for completions without their problem, or a step whose completions are not whole groups."""
    for row in rows:
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("answer"), str):
            raise ConfigError(f"{run}/samples: completions of step {row['step']} have no prompt or no answer")
    for step, count in Counter(row["step"] for row in rows).items():
        if count % size:
            raise ConfigError(
                f"{run}/samples: step {step} has {count} completions, which are not whole groups of {size}; restore or "
                "remove its file"
            )


def _check_output(file: Path, run: Path) -> None:
    if os.path.lexists(file):
        raise ConfigError(f"output={file} exists already; remove it, or give another file")
    if file.resolve().is_relative_to((run / "samples").resolve()):
        raise ConfigError(f"output={file}: this folder is for the completions of training; give another one")


def _stored(rows: list[dict[str, Any]]) -> Scores:
    names = [name.removeprefix("rewards/") for name in rows[0] if name.startswith("rewards/")]
    return Scores(
        {name: _column(rows, f"rewards/{name}") for name in names}, _column(rows, "reward"), _column(rows, "advantage")
    )


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """The numbers of a column (B,), NaN where missing; of a list, as version 0 wrote advantages by token, the mean."""
    return np.array([np.nan if row.get(name) is None else np.mean(row[name]) for row in rows], dtype=float)


def _replayed(config: Config, rows: list[dict[str, Any]], size: int) -> Scores:
    """Score the completions with the functions of training, a step at a time; rows: in the order of the steps."""
    import torch

    from grpo.algorithm.objective import choose
    from grpo.rewards.scoring import RewardError
    from grpo.training.experiment import bind_rewards
    from grpo.training.scored_completions import group_advantages, score_texts, trainer_state

    components, _, _ = bind_rewards(config)
    advantage = choose("advantage", config.objective["advantage"])
    for component in components:
        if "completion_ids" in inspect.signature(component.function).parameters:
            raise ConfigError(f"reward.components.{component.name} takes completion_ids, which samples/ do not have")
    problems = _problems(config)
    known = {(each.id, each.question, each.answer): each for each in [*problems.train, *problems.test]}
    parts: list[Scores] = []
    for step, of_step in itertools.groupby(rows, key=lambda row: row["step"]):
        part = list(of_step)
        names = [(row["problem_id"], row["prompt"], row["answer"]) for row in part]
        asked = [known.get(name, Problem(*name)) for name in names]
        texts = [row["completion"] for row in part]
        lengths = torch.tensor([row["length"] for row in part])
        state = trainer_state(config, len(problems.train), step - 1)
        try:
            scored = score_texts(components, config, problems.column_names, asked, texts, lengths, state)
        except RewardError as error:
            raise ConfigError(str(error)) from error
        advantages = group_advantages(advantage, scored.rewards, size).reshape(len(part), -1)
        parts.append(
            Scores(
                {name: values.numpy() for name, values in scored.rewards.components.items()},
                scored.rewards.total.numpy(),
                advantages.float().mean(dim=1).double().numpy(),  # of advantages by token the mean
            )
        )
    return Scores(
        {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards},
        np.concatenate([part.total for part in parts]),
        np.concatenate([part.advantages for part in parts]),
    )


def _problems(config: Config) -> Problems:
    """The problems of the config, for their columns; none, with a warning, if they cannot be loaded."""
    use_cache_if_hub_is_unreachable(*paths_of(config.data))
    try:
        loaded = bind_data(config.data)()
    except ConfigError as error:
        logger.warning("the columns of the data are missing: %s", error)
        return Problems([], [])
    # The share stays, since the trainer's state has the number of training problems.
    split = with_validation(loaded, config.data["validation_share"])
    return replace(split, test=[*split.test, *split.validation], validation=[])


def same_order(one: np.ndarray, other: np.ndarray, size: int) -> float:
    """The share of pairs of a group that both (B,) put into the same order, or both into none; groups of `size`."""
    first, second = np.triu_indices(size, k=1)
    orders = []
    for values in (one, other):
        groups = values.reshape(-1, size)  # (P, G)
        orders.append(np.sign(np.round(groups[:, first] - groups[:, second], 6)))  # (P, pairs)
    return float((orders[0] == orders[1]).mean())


def _table(stored: Scores, replayed: Scores, size: int) -> Table:
    table = Table()
    for title in ("", "stored", "replayed"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("reward", *(_mean(each.total) for each in (stored, replayed)))
    for name in dict.fromkeys([*stored.rewards, *replayed.rewards]):
        table.add_row(f"  {name}", *(_mean(each.rewards.get(name)) for each in (stored, replayed)))
    groups = [each.advantages.reshape(-1, size) for each in (stored, replayed)]
    table.add_row("groups without a signal", *(f"{(~each.any(axis=1)).mean():.1%}" for each in groups))
    table.add_row("mean |advantage|", *(f"{np.abs(each).mean():.3f}" for each in groups))
    return table


def _mean(values: np.ndarray | None) -> str:
    """The mean of the values that are not NaN, as text; empty if there are none."""
    return "" if values is None or np.isnan(values).all() else f"{np.nanmean(values):.3f}"


def _largest_changes(rows: list[dict[str, Any]], stored: Scores, replayed: Scores) -> list[str]:
    change = np.abs(replayed.advantages - stored.advantages)
    lines = []
    for place in np.argsort(-change, kind="stable")[:MOST_SHOWN]:
        if change[place] < 1e-6:
            break
        row = rows[place]
        text = row["completion"]
        shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
        lines += [
            f"step {row['step']}, problem {row['problem_id']}, answer {row['answer']}: advantage "
            f"{stored.advantages[place]:+.2f} -> {replayed.advantages[place]:+.2f}, reward "
            f"{stored.total[place]:.2f} -> {replayed.total[place]:.2f}",
            f"    {shown!r}",
        ]
    return lines


def _write(file: Path, rows: list[dict[str, Any]], replayed: Scores) -> None:
    lines = []
    for place, row in enumerate(rows):
        new = {f"rewards/{name}": _number(values[place]) for name, values in replayed.rewards.items()}
        new |= {"reward": _number(replayed.total[place]), "advantage": _number(replayed.advantages[place])}
        stored = {key: _number(value) if isinstance(value, float) else value for key, value in row.items()}
        lines.append(json.dumps({**stored, "replayed": new}, allow_nan=False))
    try:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={file} cannot be written: {error.strerror}") from error
    print(f"every completion: {file}")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
