"""Score the stored completions of a run with another reward or advantage, without a model.

python -m grpo replay run_dir=outputs/... reward.components.format.weight=0
python -m grpo replay run_dir=outputs/... objective.advantage=none
python -m grpo replay run_dir=outputs/... +reward.components.brief='{_target_: my_rewards.brief, weight: 0.5}'

All completions in samples/ are scored; samples.every=1 stores those of every step. Printed are the rewards and the
groups without a signal, stored and replayed, how often the advantages order two completions of a group in the same way,
and the completions whose advantage changes most. output=FILE writes every completion with both as JSON Lines.
"""

import inspect
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from grpo.analysis.audit import load_samples
from grpo.commands._common import changed_config, own_arguments, run_folder_of
from grpo.config.checks import typed
from grpo.config.errors import ConfigError
from grpo.config.instantiate import bind
from grpo.config.overrides import Overrides
from grpo.config.schema import Config, known_keys

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
    rows = load_samples(folder.path).to_dict("records")
    if not rows:
        raise ConfigError(f"{folder.path} stores no completions: set samples.every in a run, such as samples.every=1")
    size = int(folder.frozen_config().grpo.num_generations)
    _check_groups(rows, size, folder.path)
    output = Path(own["output"]) if "output" in own else None
    if output is not None and os.path.lexists(output):
        raise ConfigError(f"output={output} exists already; remove it, or give another file")
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


def _check_groups(rows: list[dict[str, Any]], size: int, run: Path) -> None:
    """Raise ConfigError for a step whose completions are not whole groups, such as in a file that was cut."""
    for step, count in Counter(row["step"] for row in rows).items():
        if count % size:
            raise ConfigError(
                f"{run}/samples: step {step} has {count} completions, which are not whole groups of {size}; restore or "
                "remove its file"
            )


def _stored(rows: list[dict[str, Any]]) -> Scores:
    names = [name.removeprefix("rewards/") for name in rows[0] if name.startswith("rewards/")]
    return Scores(
        {name: _column(rows, f"rewards/{name}") for name in names}, _column(rows, "reward"), _column(rows, "advantage")
    )


def _column(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """The numbers of a column (B,), NaN where missing; of a list, as version 0 wrote advantages by token, the mean."""
    return np.array([np.nan if row.get(name) is None else np.mean(row[name]) for row in rows], dtype=float)


def _replayed(config: Config, rows: list[dict[str, Any]], size: int) -> Scores:
    """Score the completions as in training, a step at a time."""
    import torch
    from transformers import TrainerState

    from grpo.algorithm.objective import choose
    from grpo.data.prompts import messages
    from grpo.rewards.scoring import RewardError, score
    from grpo.training.experiment import bind_rewards

    components, _, _ = bind_rewards(config)
    advantage = choose("advantage", config.objective["advantage"])
    for component in components:
        if "completion_ids" in inspect.signature(component.function).parameters:
            raise ConfigError(f"reward.components.{component.name} takes completion_ids, which samples/ do not have")
    problems = bind("data", config.data, without=known_keys("data"))()
    everything = [*problems.train, *problems.validation, *problems.test]
    columns_of = {(each.id, each.question, each.answer): each.columns for each in everything}
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    parts: list[Scores] = []
    for step, of_step in by_step.items():
        others = [columns_of.get((row["problem_id"], row["prompt"], row["answer"]), {}) for row in of_step]
        names = sorted({name for each in others for name in each})
        columns = {name: [each.get(name) for each in others] for name in names}
        columns |= {"id": [row["problem_id"] for row in of_step], "question": [row["prompt"] for row in of_step]}
        columns["answer"] = [row["answer"] for row in of_step]
        prompts = [messages(row["prompt"], config.data) for row in of_step]
        replies = [[{"role": "assistant", "content": row["completion"]}] for row in of_step]
        try:
            rewards = score(components, prompts, replies, columns, TrainerState(global_step=step - 1))
        except RewardError as error:
            raise ConfigError(str(error)) from error
        values = rewards.groups(size)  # (P, G, C)
        valid = ~values.isnan()
        advantages = advantage(values.where(valid, 0.0), rewards.weights, valid)
        by_row = advantages.reshape(len(of_step), -1).float().mean(dim=1)  # of advantages by token the mean
        each_component = {name: values.numpy() for name, values in rewards.components.items()}
        parts.append(Scores(each_component, rewards.total.numpy(), by_row.to(torch.float64).numpy()))
    return Scores(
        {name: np.concatenate([part.rewards[name] for part in parts]) for name in parts[0].rewards},
        np.concatenate([part.total for part in parts]),
        np.concatenate([part.advantages for part in parts]),
    )


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
    table.add_row("reward", *(f"{np.nanmean(each.total):.3f}" for each in (stored, replayed)))
    for name in dict.fromkeys([*stored.rewards, *replayed.rewards]):
        means = (each.rewards.get(name) for each in (stored, replayed))
        table.add_row(f"  {name}", *("" if values is None else f"{np.nanmean(values):.3f}" for values in means))
    groups = [each.advantages.reshape(-1, size) for each in (stored, replayed)]
    table.add_row("groups without a signal", *(f"{(~each.any(axis=1)).mean():.1%}" for each in groups))
    table.add_row("mean |advantage|", *(f"{np.abs(each).mean():.3f}" for each in groups))
    return table


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
        lines.append(json.dumps({**row, "replayed": new}))
    try:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output={file} cannot be written: {error.strerror}") from error
    print(f"every completion: {file}")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
