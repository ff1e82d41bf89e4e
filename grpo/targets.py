"""From a config's `_target_` to the function it names, with the errors in words and the trust rule applied."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from grpo.config import CONF_DIR, ConfigError, flatten

OWN = ("grpo.", "torch.optim.")


def bind(key: str, node: Mapping[str, Any], without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The function that `node['_target_']` names, with the node's other keys but `without` as keyword arguments.

    key: where the node stands in the config, for the error. Raises ConfigError where the target is missing, blocked
    (Hydra's blocklist), does not exist, or does not take those arguments.
    """
    settings = {name: value for name, value in node.items() if name not in without}
    target = settings.get("_target_")
    try:
        deferred = instantiate(settings, _partial_=True, _convert_="all")
        # Hydra's own partial asks its blocklist again on every call, 190 microseconds; it has just been asked.
        function = functools.partial(deferred.func, *deferred.args, **deferred.keywords)
    except HydraException as error:
        raise ConfigError(f"{key}._target_={target}: {_reason(error)}") from error
    _check_keywords(key, function)
    return function


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
    named = {value for key, value in flatten(composed).items() if key.endswith("_target_")}
    for file in CONF_DIR.rglob("*.yaml"):
        named.update(re.findall(r"^\s*_target_:\s*(\S+)", file.read_text(), flags=re.MULTILINE))
    for key, target in flatten(frozen).items():
        if key.endswith("_target_") and target not in named and not _is_own(str(target)):
            raise ConfigError(
                f"{folder} asks to run {target} ({key}), which neither conf/ nor this command line names; "
                f"if you trust it, add: {key}={target}"
            )


def _is_own(target: str) -> bool:
    # `grpo.run.checkpoint.shutil.rmtree` is under grpo. by its name only, so every part must be plainly ours:
    # the module that defines the function has to be the one that the path names.
    if not target.startswith(OWN):
        return False
    module, _, name = target.rpartition(".")
    try:
        function = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError):
        return True  # nothing to run: `bind` will say that it does not exist
    return str(getattr(function, "__module__", "")).startswith(OWN)


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
    reason = str(error).strip().splitlines()[0]
    return f"{reason}; it must be the dotted path of a function that Python can import from here"
