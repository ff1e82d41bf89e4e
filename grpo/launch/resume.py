"""The config of a resumed run: the frozen config with the changes of the command line."""

import logging
import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.config.compose import apply_overrides
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import FACTS, Config, on_resume
from grpo.config.trust import check_trusted
from grpo.config.values import copy_value, flatten, to_dict
from grpo.launch.freeze import freeze
from grpo.runs.folder import RunFolder

logger = logging.getLogger(__name__)


def resumed_config(folder: RunFolder, composed: DictConfig, overrides: Overrides) -> tuple[Config, dict[str, Any]]:
    """Return the config to train with, and the changes that this command line makes to the run, by dotted key.

    composed: the config from conf/ with these overrides. Raises ConfigError, with the old and the new value, if a
    change would make the run a different experiment, and if the folder names a function that is not trusted.
    """
    frozen = folder.frozen_config()
    new = new_overrides(folder, overrides)
    changed = apply_overrides(frozen, composed, new)
    named = set(new.dotted_keys)
    for key, facts in FACTS.items():
        if facts.kept_by_group and key not in named:
            copy_value(frozen, key, changed)
    check_trusted(changed, composed, folder.path)
    changed.accept_changes = composed.accept_changes
    config = freeze(changed)
    before = flatten(OmegaConf.to_container(frozen, resolve=True))
    after = flatten(to_dict(config))
    differing = [key for key in before | after if before.get(key) != after.get(key)]
    refused = [key for key in differing if not _may_change(key, before, after)]
    if refused:
        changes = ", ".join(f"{key}: {before.get(key)} -> {after.get(key)}" for key in refused)
        raise ConfigError(
            f"resume=true: {folder.path} was started with other values ({changes}); start a new run for them"
        )
    if any(_policy(key) == "rounding" for key in differing):
        logger.warning("compute settings changed: results from now on are equal up to rounding, not bit for bit")
    return config, {key: after.get(key) for key in differing}


def new_overrides(folder: RunFolder, overrides: Overrides) -> Overrides:
    """The overrides of this command line that were not on the first command line of the run.

    So the first command line can be repeated without changing anything. Overrides of keys that a later launch has
    changed are always included, since for them repeating the first value is a change; and so are those of keys that may
    change, such as tracking, since the record of someone else's folder may not be that of its config.
    """
    first = Overrides(list(Overrides(folder.first_overrides()).last_by_key.values()))
    changed = [f"{key}." for key in folder.changes()]
    again = {
        line
        for key, line in zip(first.dotted_keys, first, strict=True)
        if on_resume(key) != "free" and not any(each.startswith(f"{key}.") for each in changed)
    }
    return Overrides([line for line in overrides if line not in again])


def _may_change(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    policy = _policy(key)
    return policy in ("free", "rounding") or (policy == "longer" and _is_longer(key, before, after))


def _policy(key: str) -> str:
    if re.fullmatch(r"reward\.components\.[^.]+\.range", key):  # used only by the charts and the doctor
        return "free"
    return FACTS[key].on_resume if key in FACTS else "refused"


def _is_longer(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a change only adds steps at the end, so that the steps already taken would have been the same."""
    if after[key] < before[key] or before["grpo.lr_schedule"] != "constant":
        return False
    return key == "grpo.num_iterations" or before["grpo.num_iterations"] == 1
