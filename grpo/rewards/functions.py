"""Calls a reward function of TRL's form, `f(prompts, completions, **columns)`, and checks what it returns.

Nothing here needs torch, so that the reward process (`grpo.rewards.isolated`) starts quickly.
"""

import asyncio
import copy
import inspect
import math
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from grpo.config.instantiate import directory_restored


class RewardError(RuntimeError):
    """A reward function failed or returned invalid values; the message names the component."""


def call(
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    count: int,
    limit: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[float | str]:
    """Call the function of component `name` with copies of the arguments, for `count` completions.

    Returns for each completion its value, NaN for None, or the error message for a value that is not a finite number.
    limit: a context for the call, such as a time limit. Raises RewardError if the function raises an exception or
    returns anything but one value for each completion.
    """
    try:
        with directory_restored(), limit():
            values = function(**_copied(dict(arguments)))
            if inspect.isawaitable(values):
                values = asyncio.run(_result_of(values))
            values = _as_list(values)
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:  # the suite's own, after a stop signal
            raise
        raised = f"{type(error).__name__}: {error}{_place(error)}"
        raise RewardError(f"reward component '{name}' raised {raised}") from error
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise RewardError(
            f"reward component '{name}' returned {got} for {count} completions; "
            "it must return a list with one number, or None, for each"
        )
    return [_number(name, value) for value in values]


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


def _number(name: str, value: Any) -> float | str:
    """The value as a float, NaN for None, or the error message for an invalid value."""
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    too_long = isinstance(value, int) and value.bit_length() > 1024  # to be a float, and perhaps to be printed
    shown = "int too large for a float" if too_long else repr(value)[:80]
    return f"reward component '{name}' returned {shown}; it must be a finite number or None"
