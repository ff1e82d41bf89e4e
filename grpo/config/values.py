"""Configs as plain values: nested, flattened, and escaped for OmegaConf."""

import dataclasses
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from grpo.config.schema import LAUNCH_KEYS, Config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, without the keys that concern a single launch."""
    values = dataclasses.asdict(config)
    for name in {key.partition(".")[0] for key in LAUNCH_KEYS}:
        del values[name]
    return values


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to one dict with dotted keys; lists are kept as values."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def escape(node: Any) -> Any:
    """Escape plain values so that OmegaConf takes every string in them literally."""
    if isinstance(node, dict):
        return {key: escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [escape(value) for value in node]
    # OmegaConf takes "${" literally after a backslash; backslashes that are already before it must be doubled.
    return re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + r"\${", node) if isinstance(node, str) else node


def copy_value(source: DictConfig, key: str, target: DictConfig, to: str | None = None) -> None:
    """Copy the value of a key from `source` to `target`, in place. to: the key in `target`, if it differs.

    Interpolations in the value are resolved when it is read. The copy is escaped, so they are not resolved again.
    """
    value = OmegaConf.select(source, key)
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    with open_dict(target):
        OmegaConf.update(target, to or key, escape(plain), merge=False, force_add=True)
