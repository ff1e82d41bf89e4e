"""From a config's `_target_` to the function it names, with the errors in words and the trust rule applied."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from grpo.config.schema import CONF_DIR, Config, ConfigError, escape, first_line, flatten, to_dict

EXTRAS = {"bitsandbytes": "8bit"}  # what is installed on demand, by the extra of pyproject.toml that has it
# Where functions live that are there to be named in a config.
OWN = ("grpo.algorithm.", "grpo.data.", "grpo.rewards.", "torch.optim.")
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_", "_method_")  # orders to `instantiate`


def bind(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> Callable[..., Any]:
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
    for key, target in _targets(to_dict(config)):
        if not str(target).startswith(OWN):
            bind(key.removesuffix("._target_"), {"_target_": target})


def bind_reward(key: str, node: Mapping[str, Any]) -> Callable[..., list[float | None]]:
    """A reward function in TRL's form, `f(prompts, completions, **columns)`. Raises ConfigError for another form."""
    function = bind(key, node, without=("weight",))
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    if "completions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(
            f"{key}._target_={node['_target_']}: a reward function has the form "
            "f(prompts, completions, **columns) -> list of numbers"
        )
    return function


def check_trusted(frozen: Any, composed: Any, folder: object) -> None:
    """Refuse to run what only a run folder names; raise ConfigError with the argument that would allow it.

    Allowed are functions defined under grpo. and torch.optim., and whatever the present conf/ or command line names.
    """
    foreign = foreign_targets(frozen, {target for _, target in _targets(composed)})
    if foreign:
        known = flatten(composed)
        arguments = " ".join(f"{'' if key in known else '+'}{key}={target}" for key, target in foreign.items())
        raise ConfigError(
            f"{folder} asks to run {', '.join(f'{target} ({key})' for key, target in foreign.items())}, which neither "
            f"conf/ nor this command line names; if you trust it, add: {arguments}"
        )
    if OmegaConf.select(frozen, "model.trust_remote_code") and not composed.model.trust_remote_code:
        raise ConfigError(
            f"{folder} asks to run code that comes with the model {frozen.model.name}; "
            "if you trust it, add: model.trust_remote_code=true"
        )


def foreign_targets(config: Any, named: set[str] = frozenset()) -> dict[str, str]:
    """Key -> target of what a config runs and neither the suite, torch.optim, conf/ nor `named` has."""
    named = set(named)
    for file in CONF_DIR.rglob("*.yaml"):
        named.update(re.findall(r"^\s*_target_:\s*(\S+)", file.read_text(), flags=re.MULTILINE))
    return {key: target for key, target in _targets(config) if target not in named and not _is_own(str(target))}


def _targets(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` below a config node with its dotted key; Hydra instantiates inside lists, too."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node)
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            path = f"{key}.{name}" if key else str(name)
            if name == "_target_":
                yield path, child
            yield from _targets(child, path)


def _is_own(target: str) -> bool:
    # `grpo.data.problems.json.load` is below grpo. by its name only: the path must lead to a module of ours, not
    # through what one imports, and the function must have been defined in such a module as well.
    if not target.startswith(OWN):
        return False
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return str(getattr(function, "__module__", "")).startswith(OWN)


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
        return "Hydra refuses to run this from a config; name a function made for this key"
    while error.__cause__ is not None:
        error = error.__cause__
    extra = EXTRAS.get(getattr(error, "name", None))
    if extra is not None:
        return f'{error.name} is not installed; add it with: pip install -e ".[{extra}]"'
    return f"{first_line(error)}; it must be the dotted path of a function that Python can import from here"
