"""Rewards: named components with weights, each a function in TRL's form, scored apart and summed."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Component:
    """One part of the reward. `function(prompts, completions, **columns) -> list[float | None]`, one a row."""

    name: str
    function: Callable[..., list[float | None]]
    weight: float = 1.0


@dataclass(frozen=True)
class Rewards:
    """Rewards of B rows: each component as its function gave it (NaN where it gave None), and the weighted sum."""

    components: dict[str, Tensor]  # name -> (B,) float64
    total: Tensor  # (B,) float64


class RewardError(RuntimeError):
    """A reward function broke its contract; the message names the component."""


def score(
    components: Sequence[Component], prompts: list, completions: list, columns: Mapping[str, Sequence]
) -> Rewards:
    """Score B completions with every component and sum them by weight; a missing value (None) adds nothing.

    prompts, completions: B entries each, message lists or plain strings, as TRL passes them. columns: the data
    set's other columns, B entries each; each function gets those that it can take.
    Raises RewardError where a function raises, returns another number of values than rows, or gives no number.
    """
    scores = {c.name: _call(c, prompts, completions, columns) for c in components}
    total = sum(c.weight * torch.nan_to_num(scores[c.name], nan=0.0) for c in components)
    return Rewards(scores, total)


def _call(component: Component, prompts: list, completions: list, columns: Mapping[str, Sequence]) -> Tensor:
    arguments = {**columns, "prompts": prompts, "completions": completions}
    parameters = inspect.signature(component.function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    try:
        values = component.function(**arguments)
    except Exception as error:
        raise RewardError(f"reward component '{component.name}' raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Sequence) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise RewardError(
            f"reward component '{component.name}' returned {got} for {len(completions)} completions; "
            "it must return a list with one number, or None, for each"
        )
    return torch.tensor([_number(component.name, value) for value in values], dtype=torch.float64)


def _number(name: str, value: object) -> float:
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"reward component '{name}' returned {value!r}; it must be a finite number or None")
    return number
