"""Which functions the config of a run folder may run: a few of grpo and torch.optim, and those the user names."""

import functools
import importlib
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from grpo.config.command_line import arguments_in_shell, override
from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR
from grpo.config.schema import FUNCTION_KEYS
from grpo.config.values import flatten

LOADERS = ("grpo.data.problems.", "grpo.data.tables.")
# The targets that a run folder may name for each key: all functions of a module (written with a dot at the end), or a
# single object. They were chosen because none of them runs a further function that its settings name.
TRUSTED = {
    "objective._target_": ("grpo.algorithm.objective.Objective",),
    "rollout._target_": ("grpo.rollout.native.NativeEngine",),
    "optimizer._target_": ("torch.optim.", "grpo.algorithm.optimizer."),
    "data._target_": LOADERS,
    "data.parts.*._target_": LOADERS,
    "reward.components.*._target_": ("grpo.rewards.math_xml.",),
    "eval.accuracy._target_": ("grpo.rewards.math_xml.", "grpo.rewards.lenient.lenient"),
    "eval.graders.*._target_": ("grpo.rewards.math_xml.", "grpo.rewards.lenient.lenient"),
}


# Targets of conf/ that pass data and settings to the code of another package, which was not written for those of a
# stranger: the command line must name them.
OF_OTHER_PACKAGES = ("grpo.rewards.reasoning_gym.", "grpo.data.reasoning_gym.")


def check_trusted(frozen: Any, composed: Any, folder: object) -> None:
    """Raise ConfigError if a run folder's config would run untrusted code. The message has the argument to allow it.

    A target is allowed for a key if TRUSTED, the current conf/ or the command line names it for that key.
    frozen: the config from the run folder. composed: the config from conf/ and the command line.
    """
    foreign = foreign_targets(frozen, _named_in(composed))
    if foreign:
        known = flatten(composed)
        prefixed = {f"{'' if key in known else '+'}{key}": target for key, target in foreign.items()}
        arguments = arguments_in_shell(*(override(key, target) for key, target in prefixed.items()))
        raise ConfigError(
            f"{folder} asks to run {', '.join(f'{target} ({key})' for key, target in foreign.items())}, which neither "
            f"conf/ nor this command line names; if you trust it, add: {arguments}"
        )
    attention = str(OmegaConf.select(frozen, "model.attn_implementation"))
    if "/" in attention and attention != composed.model.attn_implementation:  # transformers would load the hub's code
        raise ConfigError(
            f"{folder} asks to run code of the hub for attention, {attention}; "
            f"if you trust it, add: {arguments_in_shell(override('model.attn_implementation', attention))}"
        )
    if OmegaConf.select(frozen, "model.trust_remote_code") and not composed.model.trust_remote_code:
        raise ConfigError(
            f"{folder} asks to run code that comes with the model {frozen.model.name}; "
            "if you trust it, add: model.trust_remote_code=true"
        )


def foreign_targets(config: Any, named: Collection[tuple[str, str]] = ()) -> dict[str, str]:
    """Key -> target for the targets of a config that neither TRUSTED, conf/ nor `named` allows for their key.

    named: as returned by `_named_in`. Targets are allowed per key, since one that is safe as an objective may run
    arbitrary code as a reward.
    """
    known = {*named, *_named_in_conf()}
    return {
        key: target
        for key, target in targets_in(config)
        if (_place(key), str(target)) not in known and not _is_trusted(key, str(target))
    }


def _place(key: str) -> str:
    """The key, with the name of a reward component, grader or part of the data replaced by `*`."""
    return re.sub(r"^(reward\.components|eval\.graders|data\.parts)\.[^.]+\.", r"\1.*.", key)


def _named_in(config: Any, key: str = "") -> set[tuple[str, str]]:
    """The pairs of (key, target) in a config."""
    return {(_place(path), str(target)) for path, target in targets_in(config, key)}


@functools.cache
def _named_in_conf() -> frozenset[tuple[str, str]]:
    named: set[tuple[str, str]] = set()
    for file in CONF_DIR.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        group = ".".join(file.relative_to(CONF_DIR).parent.parts)
        named |= _named_in(yaml.safe_load(text), "" if "@package _global_" in text else group)
    return frozenset((key, target) for key, target in named if not target.startswith(OF_OTHER_PACKAGES))


def targets_in(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the path of each function in a config: each `_target_`, also in lists, and choices."""
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
    # `grpo.data.problems.json.load` has a trusted prefix, but leads to a module that problems.py imports. Therefore the
    # path must consist of a real module and a name, and the function must be defined in a trusted module.
    module, _, name = target.rpartition(".")
    if not any(target == each or (each.endswith(".") and target.startswith(each)) for each in allowed):
        return False
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    home = f"{getattr(function, '__module__', '')}."
    return any(f"{home}{name}" == each or (each.endswith(".") and home.startswith(each)) for each in allowed)
