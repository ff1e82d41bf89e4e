"""Rewards: named components with weights, each a function in TRL's form, scored apart and summed."""

import inspect
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Component:
    """One part of the reward. `function(prompts, completions, **columns) -> list[float | None]`, one a row."""

    name: str
    function: Callable[..., list[float | None]]
    weight: float = 1.0
    timeout_s: float | None = None  # seconds that one call may take; None: no limit
    skip_errors: bool = False  # a call that fails counts as missing values, with a warning, and not as an error


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
    Raises RewardError where a function raises, takes longer than its limit, returns another number of values than
    rows, or gives no number, unless its component skips errors.
    """
    scores = {c.name: _score(c, prompts, completions, columns) for c in components}
    total = sum(c.weight * torch.nan_to_num(scores[c.name], nan=0.0) for c in components)
    return Rewards(scores, total)


def _score(component: Component, prompts: list, completions: list, columns: Mapping[str, Sequence]) -> Tensor:
    try:
        values = _call(component, prompts, completions, columns)
    except RewardError as error:
        return torch.tensor(_skipped(component, error, len(completions)), dtype=torch.float64)
    numbers = []
    for value in values:
        try:
            numbers.append(_number(component.name, value))
        except RewardError as error:
            numbers += _skipped(component, error, 1)
    return torch.tensor(numbers, dtype=torch.float64)


def _skipped(component: Component, error: RewardError, count: int) -> list[float]:
    if not component.skip_errors:
        raise error
    logger.warning("%s; skipped for %d completions", error, count)
    return [math.nan] * count


def _call(component: Component, prompts: list, completions: list, columns: Mapping[str, Sequence]) -> Sequence:
    arguments = {**columns, "prompts": prompts, "completions": completions}
    parameters = inspect.signature(component.function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    try:
        with _time_limit(component.timeout_s):
            values = component.function(**arguments)
    except _OutOfTime:
        raise RewardError(f"reward component '{component.name}' took longer than {component.timeout_s:g} s") from None
    except Exception as error:
        raise RewardError(f"reward component '{component.name}' raised {type(error).__name__}: {error}") from error
    if not isinstance(values, Sequence) or len(values) != len(completions):
        got = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
        raise RewardError(
            f"reward component '{component.name}' returned {got} for {len(completions)} completions; "
            "it must return a list with one number, or None, for each"
        )
    return values


class _OutOfTime(BaseException):
    """Not an Exception, so that a function that catches those cannot swallow it."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise _OutOfTime in the block after so many seconds, and each second again where the block caught it.

    By a signal, since it reaches what a thread could not end: sleeping, Python's own loops, and regular expressions.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    out_of_time = False

    def stop(*_: object) -> None:
        nonlocal out_of_time
        out_of_time = True
        raise _OutOfTime

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    if out_of_time:  # and the block went on
        raise _OutOfTime


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
