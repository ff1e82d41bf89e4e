# ruff: noqa: RUF009  (key and group are functions that return fields)
"""The configuration's types, and the checks that reach across its fields. Values live in conf/*.yaml.

Imports no torch: `--help`, `--cfg job` and every configuration error answer at once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict

# In a checkout conf/ stands beside grpo/; installed, it is part of the package.
_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())
LAUNCH = ["grpo", "train"] if CONF_DIR.parent == _PACKAGE else ["python", "launch.py"]


class ConfigError(Exception):
    """Bad input, said in one or two lines with the mend. Commands print it and exit with 2."""


class FileError(ConfigError, ValueError):
    """A file of a run folder that is damaged, or is not what its name says; the message names it."""


@dataclass(frozen=True)
class Facts:
    """What is known about a key beside its type. `check` reads the bounds, `--resume` the rest."""

    least: float | None = None  # the smallest value allowed
    above: float | None = None  # every value must be larger than this
    below: float | None = None  # and smaller than this
    choices: tuple[Any, ...] = ()  # empty: any value
    hint: str = ""  # what an error about the value adds
    # Whether a resumed run may change it: refused | free: how the run is watched and kept | rounding: the results stay
    # equal up to rounding | longer: only to add steps. None: as the group.
    on_resume: str | None = None
    launch_only: bool = False  # about one launch, and never written to config.yaml; so are all keys of such a group
    of_sweep: bool = False  # of such a key: the jobs of a sweep depend on it, so that sweep.json keeps it


def key(default: Any = MISSING, **facts: Any) -> Any:
    """A field of the schema with its Facts."""
    return field(default=default, metadata={"facts": Facts(**facts)})


def group(schema: type, **facts: Any) -> Any:
    """A group of fields; `on_resume` and `launch_only` hold for the keys below it, too."""
    return field(default_factory=schema, metadata={"facts": Facts(**facts)})


@dataclass
class LoraSettings:
    rank: int = key(least=1)
    alpha: float = key(above=0)  # what the adapter adds is scaled by alpha / rank
    target_modules: Any = MISSING  # all-linear, or a list of the last parts of layers' names
    init_from: str | None = MISSING  # folder of an adapter to begin with; None: one that adds nothing


@dataclass
class ModelConfig:
    name: str = MISSING  # hub name, local folder, or `tiny` for the embedded model
    attn_implementation: str = MISSING  # eager | sdpa | flash_attention_2 | ..., passed to transformers
    # Of the weights and their optimizer state; hardware.compute_dtype is that of the arithmetic.
    dtype: str = key(choices=("float32", "bfloat16"))
    device_map: Any = key(on_resume="rounding")  # auto: hardware.device decides; else one device: cpu | mps | cuda:N
    trust_remote_code: bool = MISSING
    lora: LoraSettings | None = None  # None: all weights are trained


@dataclass
class GrpoConfig:
    num_iterations: int = key(least=1, on_resume="longer")
    num_steps: int = key(least=1, on_resume="longer")
    batch_size: int | None = key(least=1)  # None until hardware=auto is resolved, when the run starts
    num_generations: int | None = key(
        least=2, hint="a group of one has nothing to compare with, so its advantage is always 0"
    )
    max_completion_length: int | None = key(least=1)
    beta: float = key(least=0)
    mu: int = key(least=1)
    epsilon: float = key(above=0, below=1, hint="usually 0.1 or 0.2")
    max_grad_norm: float = key(above=0, hint="1e9 never clips")
    lr_schedule: str = key(choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(least=0)
    max_skipped_steps: int = key(least=0, on_resume="free")


@dataclass
class CardConfig:
    """What plan=true counts on; all None: this machine, looked at."""

    memory_gb: float | None = MISSING
    tflops: float | None = MISSING  # in compute_dtype
    bandwidth_gb_s: float | None = MISSING


@dataclass
class HardwareConfig:
    device: str = key(choices=("auto", "cuda", "mps", "cpu"), on_resume="rounding")
    # None: as model.dtype; with float16 the loss is scaled.
    compute_dtype: str | None = key(choices=(None, "float32", "bfloat16", "float16"), on_resume="rounding")
    batch_size: int | None = MISSING
    num_generations: int | None = MISSING
    max_completion_length: int | None = MISSING
    micro_batch_tokens: int | None = key(least=1, on_resume="rounding")
    activation_checkpointing: bool | None = key(on_resume="rounding")
    rollout_tokens: int | None = key(least=1, on_resume="rounding")
    cuda_graphs: bool | None = key(default=None, on_resume="rounding")
    threads: int | None = key(least=1, on_resume="rounding")
    card: CardConfig = group(CardConfig, on_resume="free")


@dataclass
class RewardConfig:
    # Each component: {_target_, weight, and the function's own settings}. A dict, since users add their own.
    components: dict[str, Any] = MISSING
    timeout_s: float | None = key(above=0, hint="null sets no limit", on_resume="free")
    on_error: str = key(choices=("fail", "skip"), on_resume="free")


@dataclass
class RolloutConfig:
    temperature: float = key(above=0, hint="without randomness all completions of a group are the same")
    min_new_tokens: int = key(least=0)


@dataclass
class TrackingConfig:
    mode: str = key(choices=("auto", "online", "offline", "disabled"))
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    name: str | None = None
    job_type: str = MISSING
    tags: list[str] = MISSING
    init_timeout: float = MISSING
    completions_every: int = key(least=0)


@dataclass
class CheckpointConfig:
    every: int = key(least=0)
    keep_last: int = key(least=1)
    keep_every: int = key(least=0)
    keep_best: bool = MISSING
    overlap: bool = MISSING


@dataclass
class SamplesConfig:
    every: int = key(least=0)


@dataclass
class EvalConfig:
    every: int = key(least=0, on_resume="free")
    before: bool = MISSING
    after: bool = key(on_resume="free")
    max_problems: int | None = key(least=1)
    max_completion_length: int | None = key(least=1)
    accuracy: dict[str, Any] = MISSING


@dataclass
class SweepConfig:
    budget_hours: float | None = key(default=None, above=0, hint="null sets no limit")
    eta: int = key(default=3, least=2, hint="the best 1/eta of the arms continue", of_sweep=True)


@dataclass
class Config:
    name: str = MISSING
    seed: int = MISSING
    run_dir: str | None = key(default=None, launch_only=True, of_sweep=True)
    resume: Any = key(default=False, choices=(True, False, "auto"), launch_only=True)
    sweep_dir: str | None = key(default=None, launch_only=True)
    fork: bool = key(default=False, launch_only=True, of_sweep=True)
    fork_step: int | None = key(default=None, launch_only=True, of_sweep=True)
    plan: bool = key(default=False, launch_only=True)
    until_step: int | None = key(default=None, least=1, launch_only=True)
    sweep: SweepConfig = group(SweepConfig, launch_only=True)
    parent: dict[str, Any] | None = MISSING
    preflight: bool = key(default=True, on_resume="free")
    deterministic: bool = MISSING
    checkpoint: CheckpointConfig = group(CheckpointConfig, on_resume="free")
    samples: SamplesConfig = group(SamplesConfig, on_resume="free")
    eval: EvalConfig = group(EvalConfig)
    model: ModelConfig = group(ModelConfig)
    data: Any = MISSING  # {_target_, system_prompt, max_prompt_length, and the loader's own settings}
    reward: RewardConfig = group(RewardConfig)
    grpo: GrpoConfig = group(GrpoConfig)
    objective: Any = MISSING  # {_target_, and its own few numbers; null: those of grpo.*}
    optimizer: Any = MISSING  # {_target_, lr, ...}
    hardware: HardwareConfig = group(HardwareConfig)
    rollout: RolloutConfig = group(RolloutConfig)
    tracking: TrackingConfig = group(TrackingConfig, on_resume="free")


OPTIONAL_GROUPS: set[str] = set()  # groups that may be null, by dotted name


def _facts(schema: type, above: Facts, prefix: str) -> Iterator[tuple[str, Facts]]:
    types = get_type_hints(schema)
    for each in dataclasses.fields(schema):
        own = each.metadata.get("facts", Facts())
        own = replace(own, on_resume=own.on_resume or above.on_resume, launch_only=own.launch_only or above.launch_only)
        dotted = f"{prefix}{each.name}"
        inner = [one for one in (types[each.name], *get_args(types[each.name])) if dataclasses.is_dataclass(one)]
        if inner:
            if type(None) in get_args(types[each.name]):
                OPTIONAL_GROUPS.add(dotted)
            yield from _facts(inner[0], own, f"{dotted}.")
        else:
            yield dotted, own


# Of every key of the schema, by its dotted name.
FACTS = dict(_facts(Config, Facts(on_resume="refused"), ""))
LAUNCH_KEYS = frozenset(name for name, facts in FACTS.items() if facts.launch_only)
PASSING_KEYS = frozenset(name for name in LAUNCH_KEYS if not FACTS[name].of_sweep)
COMPUTE_KEYS = frozenset(name for name, facts in FACTS.items() if facts.on_resume == "rounding")


def on_resume(name: str) -> str:
    """What a resumed run may change of a key, as in Facts; of a group what holds for all keys below it."""
    found = {facts.on_resume for dotted, facts in FACTS.items() if f"{dotted}.".startswith(f"{name}.")}
    if found and found <= {"free", "rounding"}:
        return "rounding" if "rounding" in found else "free"
    return found.pop() if len(found) == 1 else "refused"


ConfigStore.instance().store(name="schema", node=Config)


def typed(cfg: DictConfig) -> Config:
    """The composed config as plain dataclasses, checked across fields. Raises ConfigError."""
    values = escape(OmegaConf.to_container(cfg, resolve=True))  # resolved once, and not a second time
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError naming the first value that cannot work, and the mend. None (not yet known) passes."""
    _check_facts(config)
    check_name(config.name)
    _number("optimizer.lr", config.optimizer.get("lr"))
    if config.optimizer["lr"] < 0:
        raise ConfigError(f"optimizer.lr={config.optimizer['lr']}: must be 0 or more")
    _number("data.max_prompt_length", config.data.get("max_prompt_length"))
    for name in ("beta", "epsilon"):
        own = config.objective.get(name)
        if own is not None:
            _number(f"objective.{name}", own)
            _check_number(f"objective.{name}", own, FACTS[f"grpo.{name}"])
    check_device_map(config.model.device_map)
    if config.model.lora is not None:
        _check_lora(config.model.lora)
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must lie between 0 and 2**63 - 1")
    compute = config.hardware.compute_dtype
    if config.model.dtype == "bfloat16" and compute not in (None, "bfloat16") and config.model.lora is None:
        raise ConfigError(
            f"hardware.compute_dtype={compute} has digits that model.dtype=bfloat16 has not: what they gain is rounded "
            "away from the weights; set model.dtype=float32, or hardware.compute_dtype=null"
        )
    _check_prompts(config.data)
    if not config.reward.components:
        raise ConfigError("reward.components is empty: give at least one component with a _target_")
    for name, component in config.reward.components.items():
        place = f"reward.components.{name}"
        if not isinstance(component, dict) or not component.get("_target_"):
            raise ConfigError(f"{place} needs a _target_: the dotted path of its function")
        _number(f"{place}.weight", component.get("weight", 1.0))


def _check_prompts(data: dict[str, Any]) -> None:
    examples, system_prompt = data.get("examples"), data.get("system_prompt")
    if not isinstance(examples, list) or not all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("question", "completion"))
        for each in examples
    ):
        raise ConfigError("data.examples must be a list of {question: text, completion: text}, [] for none")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"data.system_prompt={system_prompt}: must be text, or null for none")


def check_name(name: str) -> None:
    """Raise ConfigError where runs of this name would lie outside outputs/."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ConfigError(f"name={name}: must be the name of a folder below outputs/, without ..")


def check_complete(config: Config) -> None:
    """Raise ConfigError where a size is still open after the hardware was resolved."""
    for group, keys in {
        "grpo": ("batch_size", "num_generations", "max_completion_length"),
        "hardware": ("micro_batch_tokens", "rollout_tokens"),
    }.items():
        for key in keys:
            if getattr(getattr(config, group), key) is None:
                raise ConfigError(f"{group}.{key}=null: must be a number, unless hardware=auto chooses it")


def check_training(config: Config) -> None:
    """Raise ConfigError where training would go on and change nothing: for evaluating, the same config is sound."""
    target = str(config.optimizer["_target_"])
    nearest = target.startswith(("torch.optim.", "bitsandbytes.")) or target.endswith(".MuonWithAdamW")
    if config.model.dtype == "bfloat16" and nearest:
        raise ConfigError(
            f"optimizer._target_={target} with model.dtype=bfloat16: steps below 0.2 % of a weight are rounded away, "
            f"at optimizer.lr={config.optimizer['lr']} nearly all; use tuning=full_bf16, whose optimizer rounds "
            "stochastically, or model.dtype=float32 with hardware.compute_dtype=bfloat16"
        )


def check_device_map(device_map: object) -> None:
    """Raise ConfigError where it is not one device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(device_map)):
        raise ConfigError(
            f"model.device_map={device_map}: a model spread over devices cannot be trained here, which takes one: "
            "auto, cpu, mps, cuda or cuda:N"
        )


def _check_facts(config: Config) -> None:
    """What the schema says of each key's value; None (not yet known, or none) passes where it is no choice."""
    flat = flatten(dataclasses.asdict(config))
    for name, facts in FACTS.items():
        if name not in flat:  # below a group that is null
            continue
        value = flat[name]
        if facts.choices:
            if not any(value is each or (value == each and type(value) is type(each)) for each in facts.choices):
                raise ConfigError(f"{name}={_yaml(value)}: must be one of {', '.join(map(_yaml, facts.choices))}")
        elif value is not None:
            _check_number(name, value, facts)


def _check_number(name: str, value: float, facts: Facts) -> None:
    wanted = _outside(value, facts)
    if wanted is not None:
        raise ConfigError(f"{name}={value}: must {wanted}{facts.hint and '; ' + facts.hint}")


def _outside(value: float, facts: Facts) -> str | None:
    """What a number must be, where it is not; not-a-number never is."""
    if facts.below is not None and not facts.above < value < facts.below:
        return f"lie between {facts.above:g} and {facts.below:g}"
    if facts.above is not None and not value > facts.above:
        return f"be above {facts.above:g}"
    if facts.least is not None and not value >= facts.least:
        return f"be {facts.least:g} or more"
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


def kl_weight(config: Config) -> float:
    """The weight of the KL penalty: the objective's own, or else grpo.beta; 0 needs no reference model."""
    own = config.objective.get("beta")
    return config.grpo.beta if own is None else own


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of our own; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def read_yaml(file: Path, kind: type) -> Any:
    """What a YAML file holds. Raises FileError naming it where that is not of this kind, a dict or a list."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileError(f"{file} is not valid YAML: {first_line(error)}") from error
    if not isinstance(values, kind):
        what = "a mapping from keys to values" if kind is dict else "a list"
        raise FileError(f"{file} is {'empty' if values is None else 'damaged'}: it must hold {what}")
    return values


def to_dict(config: Config) -> dict[str, Any]:
    """The config of the experiment as plain nested dicts: without what is about one launch only."""
    values = dataclasses.asdict(config)
    for name in {key.partition(".")[0] for key in LAUNCH_KEYS}:
        del values[name]
    return values


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists count as values."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {
        k: v for key, child in node.items() for k, v in flatten(child, f"{prefix}.{key}" if prefix else key).items()
    }


def escape(node: Any) -> Any:
    """Plain values such that OmegaConf takes every text in them literally."""
    if isinstance(node, dict):
        return {key: escape(value) for key, value in node.items()}
    if isinstance(node, list):
        return [escape(value) for value in node]
    # A backslash before "${" makes it plain text to OmegaConf, and must itself be doubled there.
    return re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + r"\${", node) if isinstance(node, str) else node


def copy_value(source: DictConfig, key: str, target: DictConfig, to: str | None = None) -> None:
    """Set a key of a config, in place, to another one's value of it; `to`: under another name.

    The value is data from here on: reading it has resolved it, and its text is not interpolated a second time.
    """
    value = OmegaConf.select(source, key)
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    with open_dict(target):
        OmegaConf.update(target, to or key, escape(plain), merge=False, force_add=True)
