"""Convert config.yaml, trainer_state.json, sweep.json, eval/*.json and metrics rows of earlier versions to this one.

Each step from one version to the next is a pure function. A file without a version key is of version 0.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.errors import FileError, first_line
from grpo.config.reading import read_yaml
from grpo.config.schema import FACTS, LAUNCH_KEYS, OPTIONAL_GROUPS
from grpo.config.values import escape, flatten

VERSION = 2
Values = dict[str, Any]
Migration = Callable[[Values], Values]

# Keys that version 0 wrote and that had no effect on a run.
WITHOUT_EFFECT_0 = {name.partition(".")[0] for name in LAUNCH_KEYS}
# Keys added during version 0, with the values that earlier runs used implicitly.
ADDED_WITHIN_0 = {
    "preflight": False,
    "grpo.max_skipped_steps": 3,
    "checkpoint.keep_every": 0,
    "checkpoint.overlap": False,
    "rollout.min_new_tokens": 0,
    "reward.on_error": "fail",
    "reward.timeout_s": None,
    "tracking.name": None,
    "model.lora": None,
    "parent": None,
}
# The same for version 2.
ADDED_WITHIN_2: Values = {
    "data.template_arguments": {},
    "data.validation_share": 0.0,
    "eval.samples": 1,
    "eval.temperature": 0.0,
    "eval.by": [],
    "eval.sets": [],
    "eval.graders": {},
    "grpo.decay_biases_and_norms": True,
    "data.parts": None,
    "sampling": {"refill": 0, "curriculum": 0.0},
    "sampling.curriculum": 0.0,
    "reward.isolate": False,
    "target": {"accuracy": None, "stop": True},
    "hardware.compiled_decoding": False,
    "grpo.mask_truncated_completions": False,
    "grpo.train_on": None,
    "objective.kl_correction": False,
    "objective.entropy_weight": 0.0,
    "objective.sampling_correction": None,
    "objective.sampling_cap": 3.0,
    "objective.delta": None,
    "objective.cap": 5.0,
    "objective.tau_positive": 1.0,
    "objective.tau_negative": 1.05,
}
# Keys that earlier folders of version 2 may have, in config.yaml and in changes.yaml. They are ignored.
REMOVED_WITHIN_2 = ("hardware.cuda_graphs",)
# `grpo_loss`, the only objective up to version 1, as the set of choices that replaced it in version 2.
GRPO_LOSS = {
    "_target_": "grpo.algorithm.objective.Objective",
    "advantage": "group",
    "ratio": "token",
    "surrogate": "clip",
    "reduction": "row",
    "kl": "k3",
}
# Modules that were moved after version 0: old path -> new path.
MOVED_0 = {"grpo.algorithm.math_xml.": "grpo.rewards.math_xml."}
NATIVE_ENGINE = "grpo.rollout.native.NativeEngine"  # the only engine up to version 1


def load_frozen(file: Path, complete: bool = True) -> DictConfig:
    """Read a run folder's config.yaml, of this or an earlier version. Its values are not interpolated again.

    complete: whether to require that no key is missing or unknown. This is needed to train or to load a model, but not
    to display the config. Raises FileError for a file of a newer version, and for one that is not a config.
    """
    values = migrate(read_yaml(file, dict), file, CONFIG_STEPS)
    for name, value in ADDED_WITHIN_2.items():
        _set_default(values, name, value)
    for name in REMOVED_WITHIN_2:
        group, _, key = name.rpartition(".")
        if isinstance(values.get(group), dict):
            values[group].pop(key, None)
    if (values.get("data") or {}).get("_target_") == "grpo.data.problems.load_arithmetic":
        _set_default(values, "data.digits", 2)  # the only ones in earlier folders
    if complete:
        _check_keys(flatten(values), file)
    try:
        return OmegaConf.create(escape(values))
    except OmegaConfBaseException as error:  # an unsupported type, such as a date
        raise FileError(f"{file} is not a config: {first_line(error)}") from error


def _check_keys(flat: Values, file: Path) -> None:
    """Raise FileError for a key that is not in the schema, and for a key of the schema that is missing."""
    schema = [key for key, facts in FACTS.items() if not facts.launch_only]
    absent = tuple(f"{name}." for name in OPTIONAL_GROUPS if flat.get(name, "") is None)
    for name in flat:
        known = any(f"{name}.".startswith(f"{key}.") for key in schema) or f"{name}." in absent
        if not known and not any(key.startswith(f"{name}.") for key in schema):
            raise FileError(f"{file} has a key that this version does not know, {name}: remove it if it has no effect")
    for key in schema:
        if not key.startswith(absent) and not any(f"{name}.".startswith(f"{key}.") for name in flat):
            raise FileError(f"{file} lacks {key}: add it with the value that the run was started with")


def migrate(values: Values, file: Path, steps: tuple[Migration, ...]) -> Values:
    """Convert the content of a file to the current version; the result has no version key. Raises FileError."""
    values = deepcopy(values)
    version = values.pop("version", 0)
    if not isinstance(version, int) or not 0 <= version <= VERSION:
        raise FileError(
            f"{file} is of version {version}, and this grpo knows versions up to {VERSION}: install a newer one"
        )
    try:
        for step in steps[version:]:
            values = step(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{file} is not as version {version} wrote it ({type(error).__name__}: {error})") from error
    return values


def config_0_to_1(values: Values) -> Values:
    """Drop the launch keys, add the keys of ADDED_WITHIN_0, and update the targets in MOVED_0.

    Numbers of the objective that equal those of grpo.* become null, which means that they follow grpo.*.
    """
    values = {name: deepcopy(value) for name, value in values.items() if name not in WITHOUT_EFFECT_0}
    for name, value in ADDED_WITHIN_0.items():
        _set_default(values, name, value)
    hardware, objective, grpo = (values.get(group) or {} for group in ("hardware", "objective", "grpo"))
    if "card" in hardware and hardware["card"] is None:
        hardware["card"] = dict.fromkeys(("memory_gb", "tflops", "bandwidth_gb_s"))
    for name in ("beta", "epsilon"):
        if name in objective and objective[name] == grpo.get(name):
            objective[name] = None
    return _with_moved_targets(values)


def config_1_to_2(values: Values) -> Values:
    """Replace the objective by a set of choices; add the `_target_` of the rollout engine and reward ranges."""
    values = deepcopy(values)
    objective = values.get("objective") or {}
    epsilon = objective.get("epsilon")
    choices = GRPO_LOSS | {"beta": objective.get("beta"), "epsilon_low": epsilon, "epsilon_high": epsilon}
    if objective.get("_target_") == "grpo.algorithm.loss.grpo_loss":
        values["objective"] = choices
    else:  # a user's own function, in a form that is no longer supported: the run can only be reported on
        values["objective"] = choices | objective
    _set_default(values, "rollout._target_", NATIVE_ENGINE)
    return _with_declared_ranges(values)


def state_1_to_2(values: Values) -> Values:
    """Rename `reduced` (token budgets reduced after running out of memory) to `states`, and add the engine."""
    values = dict(values)
    reduced = values.pop("reduced", {})
    # The last states of version 1 had the two keys already, the first as `parts`.
    return values | {"states": values.pop("parts", reduced), "engine": values.get("engine") or NATIVE_ENGINE}


def sweep_1_to_2(values: Values) -> Values:
    """Rename the choice `optuna` of hydra/sweeper to `tpe`."""
    return values | {"sweeper": "tpe"} if values.get("sweeper") == "optuna" else values


def evaluation_1_to_2(values: Values) -> Values:
    """The rows of an evaluation have the keys of those in samples/."""
    values = deepcopy(values)
    for row in values.get("problems", []):
        if "id" in row:
            row["problem_id"] = row.pop("id")
        row.update({f"rewards/{name}": value for name, value in row.pop("rewards", {}).items()})
    return values


def metrics_row(row: Values) -> Values:
    """Rename `reward_std` in a row of metrics.jsonl that has no `reward_group_std`, which is what it was then.

    Rows have no version. Since `reward_group_std` exists, `reward_std` is over all rewards of the step, as in TRL.
    """
    if "reward_group_std" in row:
        return row
    return {"reward_group_std" if name == "reward_std" else name: value for name, value in row.items()}


def unchanged(values: Values) -> Values:
    """A step between two versions that use the same format for the file."""
    return values


CONFIG_STEPS = (config_0_to_1, config_1_to_2)
STATE_STEPS = (unchanged, state_1_to_2)
SWEEP_STEPS = (unchanged, sweep_1_to_2)
EVALUATION_STEPS = (unchanged, evaluation_1_to_2)


def _set_default(values: Values, name: str, value: Any) -> None:
    *groups, last = name.split(".")
    node: Any = values
    for each in groups:
        node = node.get(each)
        if not isinstance(node, dict):
            return
    node.setdefault(last, deepcopy(value))


def _with_declared_ranges(values: Values) -> Values:
    """Add the ranges of the default components, which were built into the charts and the doctor up to version 1."""
    components = (values.get("reward") or {}).get("components") or {}
    for target, low, high in (("correctness", 0.0, 2.0), ("tag_format", 0.0, 0.8)):
        for node in components.values():
            has_defaults = isinstance(node, dict) and node.keys() <= {"_target_", "weight"}
            if has_defaults and node.get("_target_") == f"grpo.rewards.math_xml.{target}":
                node["range"] = [low, high]
    return values


def _with_moved_targets(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_moved_targets(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {name: _moved(child) if name == "_target_" else _with_moved_targets(child) for name, child in node.items()}


def _moved(target: Any) -> Any:
    for before, now in MOVED_0.items():
        if isinstance(target, str) and target.startswith(before):
            return now + target.removeprefix(before)
    return target
