"""Rewards: named components with weights, each a function in TRL's form; scored separately and summed."""

import asyncio
import copy
import functools
import inspect
import logging
import math
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.advantage import total_reward
from grpo.config.instantiate import directory_restored
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


class RewardError(RuntimeError):
    """A reward function failed or returned invalid values; the message names the component."""


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


def accepted(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of the arguments that a reward function accepts; a setting from the config is not replaced."""
    parameters = inspect.signature(function).parameters.values()
    settings = function.keywords if isinstance(function, functools.partial) else {}
    known = {p.name for p in parameters}
    all_of_them = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in names if name not in settings and (all_of_them or name in known)]


def _score(component: RewardComponent, arguments: Mapping[str, Any]) -> Tensor:
    count = len(arguments["completions"])
    try:
        values = _call(component, arguments)
    except RewardError as error:
        return torch.tensor(_skipped(component, error, count), dtype=torch.float64)
    numbers = []
    for value in values:
        try:
            numbers.append(_number(component.name, value))
        except RewardError as error:
            numbers += _skipped(component, error, 1)
    return torch.tensor(numbers, dtype=torch.float64)


def _skipped(component: RewardComponent, error: RewardError, count: int) -> list[float]:
    if not component.skip_errors:
        raise error
    logger.warning("%s; skipped for %d completions", error, count)
    return [math.nan] * count


def _call(component: RewardComponent, arguments: Mapping[str, Any]) -> list:
    given = {name: arguments[name] for name in accepted(component.function, arguments)}
    count = len(arguments["completions"])
    try:
        with directory_restored(), _time_limit(component):
            values = component.function(**_copied(given))
            if inspect.isawaitable(values):
                values = asyncio.run(_result_of(values))
            values = _as_list(values)
    except TimeLimitExceeded:
        raise RewardError(_too_slow(component)) from None
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:  # the suite's own, after a stop signal
            raise
        raised = f"{type(error).__name__}: {error}{_place(error)}"
        raise RewardError(f"reward component '{component.name}' raised {raised}") from error
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise RewardError(
            f"reward component '{component.name}' returned {got} for {count} completions; "
            "it must return a list with one number, or None, for each"
        )
    return values


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _as_list(values: Any) -> Any:
    """An array, a tensor, a tuple, a generator and the like as a list; anything else unchanged."""
    if hasattr(values, "tolist"):
        return values.tolist()
    has_order = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)
    return list(values) if has_order else values


def _place(error: BaseException) -> str:
    """Where an error was raised: the last line that is not part of a library."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in (own or frames)[-1:])


LIBRARIES = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")))


def _copied(value: Any) -> Any:
    """A deep copy, so that a function that changes its arguments affects no other code; fast for lists and dicts."""
    if type(value) in _UNCHANGEABLE:
        return value
    if type(value) is list:
        return [each if type(each) in _UNCHANGEABLE else _copied(each) for each in value]
    if type(value) is dict:
        return {key: _copied(each) for key, each in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # such as an open file, in a column of the user's own loader
        return value


_UNCHANGEABLE = {str, int, float, bool, type(None)}


def _too_slow(component: RewardComponent) -> str:
    return f"reward component '{component.name}' took longer than {component.timeout_s or 0:g} s"


def _time_limit(component: RewardComponent) -> AbstractContextManager[None]:
    error = f"RewardError: {_too_slow(component)}, and could not be ended"
    return time_limit(component.timeout_s, error, component.on_hang, component.status_file)


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        too_long = isinstance(value, int) and value.bit_length() > 1024  # to be a float, and perhaps to be printed
        shown = "int too large for a float" if too_long else repr(value)[:80]
        raise RewardError(f"reward component '{name}' returned {shown}; it must be a finite number or None")
    return number
