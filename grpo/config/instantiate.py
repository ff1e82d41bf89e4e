"""From a config's `_target_` to the function it names, with the errors in words and the trust rule applied."""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from grpo.config.errors import ConfigError, first_line
from grpo.config.schema import Config
from grpo.config.trust import targets_in
from grpo.config.values import escape, to_dict

EXTRAS = {"bitsandbytes": "8bit"}  # what is installed on demand, by the extra of pyproject.toml that has it
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_", "_method_")  # orders to `instantiate`


def bind(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> functools.partial[Any]:
    """The function that `node['_target_']` names, with the node's other keys but `without` as keyword arguments.

    key: where the node stands in the config, for the error. Raises ConfigError where the target is missing, blocked
    (Hydra's blocklist), does not exist, or does not take those arguments.
    """
    target = node.get("_target_")
    settings = {str(name): value for name, value in node.items() if name not in ("_target_", *without)}
    _check_literal(key, settings)
    function = functools.partial(find_function(f"{key}._target_", target), **settings)
    _check_keywords(key, function)
    return function


def find_function(key: str, path: object) -> Callable[..., Any]:
    """The function or class of a dotted path, which stands at this key of a config.

    Raises ConfigError where it is blocked (Hydra's blocklist) or does not exist.
    """
    if not isinstance(path, str):
        raise ConfigError(f"{key}={path}: it must be the dotted path of a function")
    try:
        # Hydra is given the path alone: it would resolve interpolations in the settings and build what they name. Its
        # partial is not kept, since that asks the blocklist again on every call, which takes 190 microseconds.
        return instantiate({"_target_": escape(path)}, _partial_=True).func
    except HydraException as error:
        raise ConfigError(f"{key}={path}: {_reason(error)}") from error


def check_importable(config: Config) -> None:
    """Raise ConfigError where a target from elsewhere cannot be run, at once: those of the suite import torch."""
    for key, path in targets_in(to_dict(config)):
        if not str(path).startswith(("grpo.", "torch.optim.")):
            find_function(key, path)


def build(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function that a node names, as `bind` gives it; of a class one object, built with the node's settings."""
    function = bind(key, node, without)
    if not inspect.isclass(function.func):
        return function
    try:
        return function()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key}: {node['_target_']}() raised {type(error).__name__}: {first_line(error)}") from error


def bind_reward(key: str, node: Mapping[str, Any]) -> Callable[..., list[float | None]]:
    """A reward function in TRL's form, `f(prompts, completions, **columns)`, or an object that can be called so.

    Raises ConfigError for another form.
    """
    function = build(key, node, without=("weight", "range"))
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):  # a builtin without a signature, or nothing that can be called
        parameters = inspect.signature(function).parameters
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{key}._target_={node['_target_']}: it must have the form f(prompts, completions, **columns) -> list of "
            "numbers, or be a class whose objects have it"
        )
    return function


def check_call(key: str, function: Callable[..., Any], form: str, *args: str, **kwargs: str) -> None:
    """Raise ConfigError, with `form` as what is wanted, where a function cannot be called with such arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:  # the latter for a builtin without a signature
        raise ConfigError(f"{key}: {form}: {error}") from error


def _check_literal(key: str, settings: Any) -> None:
    """Raise ConfigError where settings ask Hydra to build something, which a plain value cannot do."""
    if isinstance(settings, dict | list):
        for name, child in settings.items() if isinstance(settings, dict) else enumerate(settings):
            if name in HYDRA_KEYS:
                raise ConfigError(f"{key}.{name}: settings are passed as they are; build this in the function instead")
            _check_literal(f"{key}.{name}", child)


def _check_keywords(key: str, function: functools.partial) -> None:
    try:
        inspect.signature(function.func).bind_partial(**function.keywords)
    except TypeError as error:
        raise ConfigError(f"{key}: {function.func.__qualname__}() {error}") from error
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
