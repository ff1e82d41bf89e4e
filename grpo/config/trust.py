"""What a run folder may ask to run: by key, a few functions of grpo and torch.optim, and what the user names."""

import functools
import importlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR
from grpo.config.schema import FUNCTION_KEYS
from grpo.config.values import flatten

# What a run folder may name, by the key that names it: a module's functions (with a dot at the end), or one thing. Each
# was chosen as one that runs nothing else that its settings name.
TRUSTED = {
    "objective._target_": ("grpo.algorithm.objective.Objective",),
    "rollout._target_": ("grpo.rollout.native.NativeEngine",),
    "optimizer._target_": ("torch.optim.", "grpo.algorithm.optimizer."),
    "data._target_": ("grpo.data.problems.",),
    "reward.components.*._target_": ("grpo.rewards.math_xml.",),
    "eval.accuracy._target_": ("grpo.rewards.math_xml.",),
}


def check_trusted(frozen: Any, composed: Any, folder: object) -> None:
    """Refuse to run what only a run folder names; raise ConfigError with the argument that would allow it.

    Allowed is what TRUSTED has for its key, and whatever the present conf/ or command line names.
    """
    foreign = foreign_targets(frozen, _named_in(composed))
    if foreign:
        known = flatten(composed)
        arguments = " ".join(f"{'' if key in known else '+'}{key}={target}" for key, target in foreign.items())
        raise ConfigError(
            f"{folder} asks to run {', '.join(f'{target} ({key})' for key, target in foreign.items())}, which neither "
            f"conf/ nor this command line names; if you trust it, add: {arguments}"
        )
    attention = str(OmegaConf.select(frozen, "model.attn_implementation"))
    if "/" in attention and attention != composed.model.attn_implementation:  # transformers gets its code from the hub
        raise ConfigError(
            f"{folder} asks to run code of the hub for attention, {attention}; "
            f"if you trust it, add: model.attn_implementation={attention}"
        )
    if OmegaConf.select(frozen, "model.trust_remote_code") and not composed.model.trust_remote_code:
        raise ConfigError(
            f"{folder} asks to run code that comes with the model {frozen.model.name}; "
            "if you trust it, add: model.trust_remote_code=true"
        )


def foreign_targets(config: Any, named: Collection[tuple[str, str]] = ()) -> dict[str, str]:
    """Key -> target of what a config runs and neither TRUSTED, conf/ nor `named` has for that key.

    named: as `_named_in` gives it. By key, since what is safe as an objective may run anything as a reward.
    """
    known = {*named, *_named_in_conf()}
    return {
        key: target
        for key, target in targets_in(config)
        if (_place(key), str(target)) not in known and not _is_trusted(key, str(target))
    }


def _place(key: str) -> str:
    """The key, the same for all reward components."""
    return re.sub(r"^reward\.components\.[^.]+\.", "reward.components.*.", key)


def _named_in(config: Any, key: str = "") -> set[tuple[str, str]]:
    """Where a config names which targets."""
    return {(_place(path), str(target)) for path, target in targets_in(config, key)}


@functools.cache
def _named_in_conf() -> frozenset[tuple[str, str]]:
    named: set[tuple[str, str]] = set()
    for file in CONF_DIR.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        group = ".".join(file.relative_to(CONF_DIR).parent.parts)
        named |= _named_in(yaml.safe_load(text), "" if "@package _global_" in text else group)
    return frozenset(named)


def targets_in(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every path of a function below a config, with its dotted key: a `_target_`, also inside lists, or a choice."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node)
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            path = f"{key}.{name}" if key else str(name)
            if name == "_target_" or (path in FUNCTION_KEYS and "." in str(child)):
                yield path, child
            yield from targets_in(child, path)


def _is_trusted(key: str, target: str) -> bool:
    allowed = TRUSTED.get(_place(key), ())
    # `grpo.data.problems.json.load` is below grpo. by its name only: the path must lead to a module of ours, not
    # through what one imports, and the function must have been defined in such a module as well.
    module, _, name = target.rpartition(".")
    if not any(target == each or (each.endswith(".") and target.startswith(each)) for each in allowed):
        return False
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    home = f"{getattr(function, '__module__', '')}."
    return any(f"{home}{name}" == each or (each.endswith(".") and home.startswith(each)) for each in allowed)
