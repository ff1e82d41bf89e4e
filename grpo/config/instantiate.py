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
from grpo.config.trust import OWN, targets_in
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
    if not isinstance(target, str):
        raise ConfigError(f"{key}._target_={target}: it must be the dotted path of a function")
    try:
        # Hydra is given the target alone: it would resolve interpolations in the settings and build what they name.
        deferred = instantiate({"_target_": escape(target)}, _partial_=True)
    except HydraException as error:
        raise ConfigError(f"{key}._target_={target}: {_reason(error)}") from error
    # Hydra's own partial asks its blocklist again on every call, 190 microseconds; it has just been asked.
    function = functools.partial(deferred.func, **settings)
    _check_keywords(key, function)
    return function


def check_importable(config: Config) -> None:
    """Raise ConfigError where a target from elsewhere cannot be run, at once: those of the suite import torch."""
    for key, target in targets_in(to_dict(config)):
        if not str(target).startswith(OWN):
            bind(key.removesuffix("._target_"), {"_target_": target})


def bind_reward(key: str, node: Mapping[str, Any]) -> Callable[..., list[float | None]]:
    """A reward function in TRL's form, `f(prompts, completions, **columns)`. Raises ConfigError for another form."""
    function = bind(key, node, without=("weight",))
    check_reward_form(key, function, f"{node['_target_']}: a reward function has")
    return function


def check_reward_form(key: str, function: Callable[..., Any], what: str) -> None:
    """Raise ConfigError where a callable, `what` in the message, cannot be called as f(completions=..., **columns)."""
    parameters: Mapping[str, inspect.Parameter] = {}
    with suppress(TypeError, ValueError):  # a builtin without a signature
        parameters = inspect.signature(function).parameters
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(f"{key}._target_={what} the form f(prompts, completions, **columns) -> list of numbers")


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
