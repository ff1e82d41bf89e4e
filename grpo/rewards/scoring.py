"""Rewards: named components with weights, each a function in TRL's form; scored separately and summed."""

import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.advantage import total_reward
from grpo.rewards.functions import RewardError, call
from grpo.rewards.isolated import IsolatedFunction
from grpo.rewards.time_limit import TimeLimitExceeded, end_process, time_limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardComponent:
    """One part of the reward. `function(prompts, completions, **columns)` returns a number or None for each row.

    The result can be a list, an array, a tensor or another iterable, and the function can be `async`.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    timeout_s: float | None = None  # seconds that one call may take; None: no limit
    skip_errors: bool = False  # a failed call gives missing values and a warning instead of an error
    on_hang: Callable[[str], None] = end_process  # called in another thread with an error message; must end the process
    status_file: Path | None = None  # status.json of the run, for the error if this process has to be killed


@dataclass(frozen=True)
class Rewards:
    """Rewards of B rows: the values of each component (NaN where it returned None), and the weighted sum."""

    components: dict[str, Tensor]  # name -> (B,) float64, for C components
    weights: Tensor  # (C,) float64
    total: Tensor  # (B,) float64; a missing value adds nothing; NaN where no component gave a value

    def groups(self, size: int) -> Tensor:
        """The values of the components, NaN where missing, as (P, G, C) for groups of `size` = G completions."""
        return torch.stack([*self.components.values()], dim=-1).view(-1, size, len(self.components))


def score(
    components: Sequence[RewardComponent],
    prompts: list,
    completions: list,
    columns: Mapping[str, Sequence],
    trainer_state: Any = None,
) -> Rewards:
    """Score B completions with at least one component and sum them by weight; a missing value (None) adds nothing.

    prompts, completions: B entries each, message lists or plain strings, as TRL passes them. columns: the data
    set's other columns, B entries each; trainer_state: the progress of training, in the form of transformers. Each
    function gets copies of those that it accepts, except columns with the name of one of its settings in the config.
    Raises RewardError if a function raises, exceeds its time limit, or returns a wrong number of values or an invalid
    value, unless its component skips errors.
    """
    arguments = {**columns, "prompts": prompts, "completions": completions}
    if trainer_state is not None:
        arguments["trainer_state"] = trainer_state
    scores = {c.name: _score(c, arguments) for c in components}
    weights = torch.tensor([c.weight for c in components], dtype=torch.float64)
    values = torch.stack([*scores.values()], dim=-1) if scores else torch.empty(len(completions), 0)  # (B, C)
    return Rewards(scores, weights, total_reward(values, weights, ~values.isnan()))


def settings_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The settings from the config with which a reward function is called; none for an object, which has its own."""
    if isinstance(function, IsolatedFunction):
        return function.settings
    return function.keywords if isinstance(function, functools.partial) else {}


def accepted(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of the arguments that a reward function accepts; a setting from the config is not replaced."""
    parameters = inspect.signature(function).parameters.values()
    settings = settings_of(function)
    known = {p.name for p in parameters}
    all_of_them = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in names if name not in settings and (all_of_them or name in known)]


def _score(component: RewardComponent, arguments: Mapping[str, Any]) -> Tensor:
    count = len(arguments["completions"])
    try:
        values = _call(component, arguments)
    except RewardError as error:
        return torch.tensor(_skipped(component, error, count), dtype=torch.float64)
    numbers: list[float] = []
    for value in values:
        numbers += _skipped(component, RewardError(value), 1) if isinstance(value, str) else [value]
    return torch.tensor(numbers, dtype=torch.float64)


def _skipped(component: RewardComponent, error: RewardError, count: int) -> list[float]:
    if not component.skip_errors:
        raise error
    logger.warning("%s; skipped for %d completions", error, count)
    return [math.nan] * count


def _call(component: RewardComponent, arguments: Mapping[str, Any]) -> list[float | str]:
    function = component.function
    count = len(arguments["completions"])
    given = {name: arguments[name] for name in accepted(function, arguments)}
    try:
        if isinstance(function, IsolatedFunction):
            return function.call(component.name, given, count, component.timeout_s)
        return call(component.name, function, given, count, lambda: _time_limit(component))
    except TimeLimitExceeded:
        raise RewardError(_too_slow(component)) from None


def _too_slow(component: RewardComponent) -> str:
    return f"reward component '{component.name}' took longer than {component.timeout_s or 0:g} s"


def _time_limit(component: RewardComponent) -> AbstractContextManager[None]:
    error = f"RewardError: {_too_slow(component)}, and could not be ended"
    return time_limit(component.timeout_s, error, component.on_hang, component.status_file)
