"""What a run folder may ask to run: algorithms, data and rewards of grpo, torch.optim, and what the user names."""

import importlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR
from grpo.config.schema import FUNCTION_KEYS
from grpo.config.values import flatten

# Where functions live that are there to be named in a config.
OWN = ("grpo.algorithm.", "grpo.data.", "grpo.rewards.", "grpo.rollout.native.", "torch.optim.")


def check_trusted(frozen: Any, composed: Any, folder: object) -> None:
    """Refuse to run what only a run folder names; raise ConfigError with the argument that would allow it.

    Allowed are functions defined in the modules of OWN, and whatever the present conf/ or command line names.
    """
    foreign = foreign_targets(frozen, {target for _, target in targets_in(composed)})
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


def foreign_targets(config: Any, named: Collection[str] = ()) -> dict[str, str]:
    """Key -> target of what a config runs and neither OWN, conf/ nor `named` has."""
    known = set(named)
    for file in CONF_DIR.rglob("*.yaml"):
        known.update(re.findall(r"^\s*_target_:\s*(\S+)", file.read_text(), flags=re.MULTILINE))
    return {key: target for key, target in targets_in(config) if target not in known and not _is_own(str(target))}


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
