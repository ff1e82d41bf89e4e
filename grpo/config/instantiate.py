"""Resolve the `_target_` of a config to a function or an object, with readable errors."""

import functools
import inspect
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from grpo.config.errors import ConfigError, first_line
from grpo.config.schema import Config
from grpo.config.trust import targets_in
from grpo.config.values import escape, to_dict

EXTRAS = {
    "bitsandbytes": "8bit",
    "math_verify": "math",
    "reasoning_gym": "reasoning-gym",
}  # optional package -> extra of pyproject.toml that installs it
SETTINGS = {float: "a number", int: "an integer", bool: "true or false"}  # what an annotation asks for
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_", "_method_")  # special in `instantiate`


@contextmanager
def directory_restored() -> Iterator[None]:
    """Restore the working directory after the block, for code of the user that may change it."""
    before = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def bind(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> functools.partial[Any]:
    """Bind the function `node['_target_']` to the node's other keys, except `without`, as keyword arguments.

    key: the place of the node in the config, for error messages. Raises ConfigError if the target is missing, is on
    Hydra's blocklist, does not exist, or does not accept these arguments.
    """
    target = node.get("_target_")
    settings = {str(name): value for name, value in node.items() if name not in ("_target_", *without)}
    _check_literal(key, settings)
    function = functools.partial(find_function(f"{key}._target_", target), **settings)
    _check_keywords(key, function)
    return function


def find_function(key: str, path: object) -> Callable[..., Any]:
    """Import the function or class with a dotted path. key: where the config has the path, for error messages.

    Raises ConfigError if it is on Hydra's blocklist or does not exist.
    """
    if not isinstance(path, str):
        raise ConfigError(f"{key}={path}: it must be the dotted path of a function")
    try:
        # Only the path is passed to Hydra: in the settings it would resolve interpolations and instantiate targets. Its
        # partial is not kept, since it would check the blocklist again on every call, which takes 190 microseconds.
        with directory_restored():
            return instantiate({"_target_": escape(path)}, _partial_=True).func
    except HydraException as error:
        raise ConfigError(f"{key}={path}: {_reason(error)}") from error
    except SystemExit as error:
        if type(error) is not SystemExit:  # the suite's own, after a stop signal
            raise
        raise ConfigError(f"{key}={path}: its module calls sys.exit() when it is imported") from error


def check_importable(config: Config, without: Container[str]) -> None:
    """Raise ConfigError if a target outside the suite and torch.optim cannot be imported.

    The others are not checked this early, since importing them imports torch. without: places in the config whose
    targets are not checked either.
    """
    for key, path in targets_in(to_dict(config)):
        is_checked = key.removesuffix("._target_") not in without
        if is_checked and not str(path).startswith(("grpo.", "torch.optim.")):
            find_function(key, path)


def build(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Like `bind` if the target is a function; if it is a class, return an object built with the node's settings."""
    function = bind(key, node, without)
    if not inspect.isclass(function.func):
        return function
    try:
        with directory_restored():
            return function()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:  # the suite's own, after a stop signal
            raise
        raise ConfigError(f"{key}: {node['_target_']}() raised {type(error).__name__}: {first_line(error)}") from error


def bind_reward(key: str, node: Mapping[str, Any]) -> Callable[..., list[float | None]]:
    """Build a reward function of TRL's form, `f(prompts, completions, **columns)`, or a callable object of that form.

    Raises ConfigError for any other form, and for settings that a function of this suite does not take.
    """
    function = build(key, node, without=("weight", "range", "isolate"))
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):  # a builtin without a signature, or not callable
        parameters = inspect.signature(function).parameters
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{key}._target_={node['_target_']}: it must have the form f(prompts, completions, **columns) -> list of "
            "numbers, or be a class whose objects have it"
        )
    if str(node["_target_"]).startswith("grpo.") and "completions" in parameters:
        _check_own_settings(key, function, parameters)
    return function


def _check_own_settings(key: str, function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Check the settings of one of the suite's reward functions, whose annotations say what they must be.

    The function raises a ValueError that begins with `name=value` for other limits, also without completions.
    """
    settings = getattr(function, "keywords", {})
    if settings.keys() & {"prompts", "completions", "completion_ids"}:
        raise ConfigError(f"{key}: prompts, completions and completion_ids are given by the run; remove the setting")
    for name, value in settings.items():
        kind = parameters[name].annotation if name in parameters else None
        if kind in SETTINGS and not _is_of_kind(value, kind):
            raise ConfigError(f"{key}.{name}={value}: must be {SETTINGS[kind]}")
    missing = [each for each in parameters.values() if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    if any(each.kind == each.KEYWORD_ONLY for each in missing):
        return  # a setting or a column of the data; `check_call` reports it if it stays missing
    try:
        function(**{each.name: [] for each in missing})
    except ValueError as error:
        if str(error).startswith(tuple(f"{name}=" for name in settings)):
            raise ConfigError(f"{key}.{error}") from error


def _is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value is a bool, an int, or for float any finite number."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int) or (kind is float and isinstance(value, float) and math.isfinite(value))


def check_call(key: str, function: Callable[..., Any], form: str, *args: str, **kwargs: str) -> None:
    """Raise ConfigError if a function cannot be called with such arguments. form: what is expected, for the message."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:  # the latter for a builtin without a signature
        raise ConfigError(f"{key}: {form}: {error}") from error


def _check_literal(key: str, settings: Any) -> None:
    """Raise ConfigError if settings contain one of HYDRA_KEYS: settings are passed as plain values."""
    if isinstance(settings, dict | list):
        for name, child in settings.items() if isinstance(settings, dict) else enumerate(settings):
            if name in HYDRA_KEYS:
                raise ConfigError(f"{key}.{name}: settings are passed as they are; build this in the function instead")
            _check_literal(f"{key}.{name}", child)


def _check_keywords(key: str, function: functools.partial) -> None:
    try:
        inspect.signature(function.func).bind_partial(**function.keywords)
    except TypeError as error:
        name = getattr(function.func, "__qualname__", type(function.func).__qualname__)
        raise ConfigError(f"{key}: {name}() {error}") from error
    except ValueError:
        pass  # a builtin without a signature


def _reason(error: BaseException) -> str:
    if "blocklist" in str(error):
        return "Hydra refuses to run this from a config; name a function that is meant for this key"
    while error.__cause__ is not None:
        error = error.__cause__
    missing = error.name if isinstance(error, ImportError) else None
    if missing in EXTRAS:
        return f'{missing} is not installed; add it with: pip install -e ".[{EXTRAS[missing]}]"'
    return f"{first_line(error)}; it must be the dotted path of a function that Python can import from here"
