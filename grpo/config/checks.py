"""Checks of a whole config: the constraints on each key from the schema, and constraints across keys."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.errors import ConfigError
from grpo.config.objective_checks import check_objective
from grpo.config.schema import FACTS, OPEN_GROUPS, Config, EvalConfig, Facts, LoraSettings
from grpo.config.values import escape, flatten


@dataclass(frozen=True)
class Sizes:
    """The sizes that may be null in a config before the hardware is resolved. Here none of them is null."""

    batch_size: int  # prompts per step
    num_generations: int
    max_completion_length: int
    micro_batch_tokens: int
    rollout_tokens: int


def typed(cfg: DictConfig) -> Config:
    """Convert the composed config to dataclasses and check it. Raises ConfigError."""
    values = escape(OmegaConf.to_container(cfg, resolve=True))  # escaped, so as not to be resolved again
    for name, schema in OPEN_GROUPS.items():
        values[name] = _typed_group(name, schema, values.get(name))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)  # the values were merged into its schema
    check(config)
    return config


def _typed_group(group: str, schema: type, values: Any) -> dict[str, Any]:
    """Apply the types and defaults of the schema to an open group. `values` and the result are escaped."""
    if not isinstance(values, dict):
        raise ConfigError(f"{group}={_yaml(values)}: must be a group of keys with a _target_")
    result = dict(values)
    typed_keys = OmegaConf.structured(schema)
    for each in dataclasses.fields(schema):
        if each.name not in values:
            if each.default is MISSING:
                raise ConfigError(f"{group}.{each.name} is missing")
            result[each.name] = each.default
        elif get_type_hints(schema)[each.name] is not Any and _applies(each.metadata.get("facts", Facts()), values):
            try:
                typed_keys[each.name] = values[each.name]
            except OmegaConfBaseException as error:
                kind = "a whole number" if get_type_hints(schema)[each.name] is int else "a number"
                raise ConfigError(f"{group}.{each.name}={_yaml(values[each.name])}: must be {kind}") from error
            result[each.name] = escape(typed_keys[each.name])
    return result


def check(config: Config) -> None:
    """Raise ConfigError for the first invalid value, with the fix. None (not yet known) is accepted."""
    _check_facts(config)
    check_name(config.name)
    check_device_map(config.model.device_map)
    _check_project(config.tracking.project)
    if config.model.lora is not None:
        _check_lora(config.model.lora)
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must lie between 0 and 2**63 - 1")
    check_lineage(config.parent)
    compute = config.hardware.compute_dtype
    if config.model.dtype == "bfloat16" and compute not in (None, "bfloat16") and config.model.lora is None:
        raise ConfigError(
            f"hardware.compute_dtype={compute} is more precise than model.dtype=bfloat16: what it gains is rounded "
            "away from the weights; set model.dtype=float32, or hardware.compute_dtype=null"
        )
    grpo = config.grpo
    if grpo.train_on is not None and grpo.num_generations is not None and grpo.train_on > grpo.num_generations:
        raise ConfigError(
            f"grpo.train_on={grpo.train_on}: a group has only grpo.num_generations={grpo.num_generations} completions"
        )
    _check_prompts(config.data)
    _check_evaluation(config.eval)
    if not config.reward.components:
        raise ConfigError("reward.components is empty: give at least one component with a _target_")
    for place, function in (
        *((f"reward.components.{name}", each) for name, each in config.reward.components.items()),
        *((f"eval.graders.{name}", each) for name, each in config.eval.graders.items()),
    ):
        if not isinstance(function, dict) or not function.get("_target_"):
            raise ConfigError(f"{place} needs a _target_: the dotted path of its function")
        if function.get("isolate") not in (None, True, False):
            raise ConfigError(f"{place}.isolate={function['isolate']}: must be true or false")
    for name, component in config.reward.components.items():
        place = f"reward.components.{name}"
        _number(f"{place}.weight", component.get("weight", 1.0))
        if component.get("range") is not None:
            _check_range(f"{place}.range", component["range"])
    check_objective(config)
    if config.target.accuracy is not None and not config.eval.every:
        raise ConfigError(
            f"target.accuracy={config.target.accuracy} needs evaluations during training: set eval.every, such as 10"
        )


def _check_evaluation(settings: EvalConfig) -> None:
    if "accuracy" in settings.graders:
        raise ConfigError("eval.graders.accuracy: this name is that of eval.accuracy; choose another one")
    if settings.samples > 1 and settings.temperature == 0:
        raise ConfigError(
            f"eval.samples={settings.samples} with eval.temperature=0 gives {settings.samples} times the same "
            "completion; set eval.temperature=1, or eval.samples=1"
        )


def _check_project(project: str | None) -> None:
    if project is not None and (not project or len(project) > 128 or set(project) & set("/\\#?%:")):
        raise ConfigError(f"tracking.project={project}: W&B takes at most 128 characters, and none of / \\ # ? % :")


def _check_range(key: str, ends: object) -> None:
    if not isinstance(ends, list) or len(ends) != 2:
        raise ConfigError(f"{key}={_yaml(ends)}: must be the lowest and the highest value, such as [0, 1]")
    for end in ends:
        _number(key, end)
    if not ends[0] < ends[1]:
        raise ConfigError(f"{key}={_yaml(ends)}: the first must be lower than the second")


def _check_prompts(data: dict[str, Any]) -> None:
    examples = data.get("examples")
    system_prompt = data.get("system_prompt")
    if not isinstance(examples, list) or not all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("question", "completion"))
        for each in examples
    ):
        raise ConfigError("data.examples must be a list of {question: text, completion: text}, [] for none")
    if data.get("parts") is not None:
        _check_parts(data["parts"])
    arguments = data.get("template_arguments")
    if arguments is not None and (not isinstance(arguments, dict) or not all(isinstance(n, str) for n in arguments)):
        raise ConfigError("data.template_arguments must be variables of the chat template by name, {} for none")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"data.system_prompt={system_prompt}: must be text, or null for none")


def _check_parts(parts: object) -> None:
    """The parts of a mixture: for each name a group data with a weight."""
    if not isinstance(parts, dict) or not parts:
        raise ConfigError("data.parts must be a group data by the name of each part: see conf/data/gsm8k_math.yaml")
    for name, part in parts.items():
        if not isinstance(part, dict) or not part.get("_target_"):
            raise ConfigError(f"data.parts.{name} needs a _target_: add a file of data to the defaults of your mixture")
        weight = part.get("weight", 1.0)
        _number(f"data.parts.{name}.weight", weight)
        if weight < 0:
            raise ConfigError(f"data.parts.{name}.weight={weight}: must be 0 or more")
    if not any(part.get("weight", 1.0) for part in parts.values()):
        raise ConfigError(
            f"data.parts: the weights of {', '.join(parts)} sum to 0; give the parts to train on a weight above 0"
        )


def check_lineage(parent: Mapping[str, Any] | None) -> None:
    """Raise ConfigError if the step or the number of problems in a fork's `parent` is not a count."""
    for name in ("step", "num_problems"):
        value = None if parent is None else parent.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 2**48):
            raise ConfigError(f"parent.{name}={value}: must be a whole number, 0 or more")


def check_name(name: str) -> None:
    """Raise ConfigError if runs of this name would be stored outside outputs/."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ConfigError(f"name={name}: must be the name of a folder below outputs/, without ..")


def complete_sizes(config: Config) -> Sizes:
    """Return the sizes of a config whose hardware is resolved. Raises ConfigError if one is still null."""
    grpo = config.grpo
    hardware = config.hardware
    return Sizes(
        batch_size=_not_null("grpo.batch_size", grpo.batch_size),
        num_generations=_not_null("grpo.num_generations", grpo.num_generations),
        max_completion_length=_not_null("grpo.max_completion_length", grpo.max_completion_length),
        micro_batch_tokens=_not_null("hardware.micro_batch_tokens", hardware.micro_batch_tokens),
        rollout_tokens=_not_null("hardware.rollout_tokens", hardware.rollout_tokens),
    )


def _not_null(key: str, size: int | None) -> int:
    if size is None:
        raise ConfigError(f"{key}=null: must be a number, unless hardware=auto chooses it")
    return size


def check_training(config: Config) -> None:
    """Raise ConfigError if training would hardly change the weights. Evaluation with the same config is possible."""
    target = str(config.optimizer["_target_"])
    nearest = target.startswith(("torch.optim.", "bitsandbytes.")) or target.endswith(".MuonWithAdamW")
    if config.model.dtype == "bfloat16" and nearest:
        raise ConfigError(
            f"optimizer._target_={target} with model.dtype=bfloat16: steps below 0.2 % of a weight are rounded away, "
            f"at optimizer.lr={config.optimizer['lr']} nearly all; use optimizer=adamw_bf16, which rounds "
            "stochastically, or tuning=lora, or with twice the memory tuning=full hardware.compute_dtype=bfloat16"
        )


def check_device_map(device_map: object) -> None:
    """Raise ConfigError if the device map is not a single device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(device_map)):
        raise ConfigError(
            f"model.device_map={device_map}: must be one device, since no model is split over several: "
            "auto, cpu, mps, cuda or cuda:N"
        )


def _check_facts(config: Config) -> None:
    """Check each value against the schema. A key without choices may be None (not yet known, or unset)."""
    flat = flatten(dataclasses.asdict(config))
    for name, facts in FACTS.items():
        if name not in flat:  # its group is null
            continue
        value = flat[name]
        if not _applies(facts, {"_target_": flat.get(f"{name.rpartition('.')[0]}._target_")}):
            continue
        if facts.choices:
            if not any(value is each or (value == each and type(value) is type(each)) for each in facts.choices):
                raise ConfigError(f"{name}={_yaml(value)}: must be one of {', '.join(map(_yaml, facts.choices))}")
        elif value is not None:
            _check_number(name, value, facts)


def _applies(facts: Facts, group: Mapping[str, Any]) -> bool:
    """Whether the facts of a key hold in its group: another function may give the key another meaning."""
    return facts.of_target is None or group.get("_target_") == facts.of_target


def _check_number(name: str, value: float, facts: Facts) -> None:
    wanted = _outside(value, facts)
    if wanted is not None:
        raise ConfigError(f"{name}={value}: must {wanted}{facts.hint and '; ' + facts.hint}")


def _outside(value: float, facts: Facts) -> str | None:
    """The bound that a number violates, worded for the error, or None. NaN violates every bound."""
    if facts.between is not None and not facts.between[0] < value < facts.between[1]:
        return "lie between {:g} and {:g}".format(*facts.between)
    if facts.above is not None and not value > facts.above:
        return f"be above {facts.above:g}"
    if facts.least is not None and not value >= facts.least:
        return f"be {facts.least:g} or more"
    if facts.most is not None and not value <= facts.most:
        return f"be {facts.most:g} or less"
    return None


def _check_lora(lora: LoraSettings) -> None:
    modules = lora.target_modules
    if modules != "all-linear" and not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise ConfigError(
            f"model.lora.target_modules={modules}: must be all-linear, or a list of layers' names such as "
            "[q_proj,v_proj]"
        )


def _number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}={_yaml(value)}: must be a number")


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
