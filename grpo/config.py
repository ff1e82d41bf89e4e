"""The configuration's types, and the checks that reach across its fields. Values live in conf/*.yaml.

Imports no torch: `--help`, `--cfg job` and every configuration error answer at once.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


class ConfigError(Exception):
    """Bad input, said in one or two lines with the mend. Commands print it and exit with 2."""


class FileError(ConfigError, ValueError):
    """A file of a run folder that is damaged, or is not what its name says; the message names it."""


@dataclass
class LoraSettings:
    rank: int = MISSING
    alpha: float = MISSING  # what the adapter adds is scaled by alpha / rank
    target_modules: Any = MISSING  # all-linear, or a list of the last parts of layers' names
    init_from: str | None = MISSING  # folder of an adapter to begin with; None: one that adds nothing


@dataclass
class ModelConfig:
    name: str = MISSING  # hub name, local folder, or `tiny` for the embedded model
    attn_implementation: str = MISSING  # eager | sdpa | flash_attention_2 | ..., passed to transformers
    dtype: str = MISSING  # of the weights and their optimizer state; hardware.compute_dtype is that of the arithmetic
    device_map: Any = MISSING  # auto: hardware.device decides; else one device: cpu | mps | cuda | cuda:N
    trust_remote_code: bool = MISSING
    lora: LoraSettings | None = None  # None: all weights are trained


@dataclass
class GrpoConfig:
    num_iterations: int = MISSING
    num_steps: int = MISSING
    batch_size: int | None = MISSING  # None until hardware=auto is resolved, when the run starts
    num_generations: int | None = MISSING
    max_completion_length: int | None = MISSING
    beta: float = MISSING
    mu: int = MISSING
    epsilon: float = MISSING
    max_grad_norm: float = MISSING
    lr_schedule: str = MISSING  # constant | linear | cosine
    warmup_steps: int = MISSING
    max_skipped_steps: int = MISSING


@dataclass
class CardConfig:
    """What plan=true counts on; all None: this machine, looked at."""

    memory_gb: float | None = MISSING
    tflops: float | None = MISSING  # in compute_dtype
    bandwidth_gb_s: float | None = MISSING


@dataclass
class HardwareConfig:
    device: str = MISSING  # auto | cuda | mps | cpu
    compute_dtype: str | None = MISSING  # None: as model.dtype | float32 | bfloat16 | float16 (its loss is scaled)
    batch_size: int | None = MISSING
    num_generations: int | None = MISSING
    max_completion_length: int | None = MISSING
    micro_batch_tokens: int | None = MISSING
    activation_checkpointing: bool | None = MISSING
    rollout_tokens: int | None = MISSING
    cuda_graphs: bool | None = None
    threads: int | None = MISSING
    card: CardConfig = field(default_factory=CardConfig)


@dataclass
class RewardConfig:
    # Each component: {_target_, weight, and the function's own settings}. A dict, since users add their own.
    components: dict[str, Any] = MISSING
    timeout_s: float | None = MISSING
    on_error: str = MISSING  # fail | skip


@dataclass
class RolloutConfig:
    temperature: float = MISSING
    min_new_tokens: int = MISSING


@dataclass
class TrackingConfig:
    mode: str = MISSING  # auto | online | offline | disabled
    project: str = MISSING
    entity: str | None = MISSING
    group: str | None = MISSING
    name: str | None = None
    job_type: str = MISSING
    tags: list[str] = MISSING
    init_timeout: float = MISSING
    completions_every: int = MISSING


@dataclass
class CheckpointConfig:
    every: int = MISSING
    keep_last: int = MISSING
    keep_every: int = MISSING
    keep_best: bool = MISSING
    overlap: bool = MISSING


@dataclass
class SamplesConfig:
    every: int = MISSING


@dataclass
class EvalConfig:
    every: int = MISSING
    before: bool = MISSING
    after: bool = MISSING
    max_problems: int | None = MISSING
    max_completion_length: int | None = MISSING
    accuracy: dict[str, Any] = MISSING


@dataclass
class SweepConfig:
    budget_hours: float | None = None
    eta: int = 3


@dataclass
class Config:
    name: str = MISSING
    seed: int = MISSING
    run_dir: str | None = MISSING
    resume: Any = MISSING  # false | true | auto
    sweep_dir: str | None = MISSING
    fork: bool = MISSING
    fork_step: int | None = MISSING
    parent: dict[str, Any] | None = MISSING
    plan: bool = MISSING
    preflight: bool = True
    until_step: int | None = None
    sweep: SweepConfig = field(default_factory=SweepConfig)
    deterministic: bool = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = MISSING  # {_target_, system_prompt, max_prompt_length, and the loader's own settings}
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    objective: Any = MISSING  # {_target_, and its own few numbers}
    optimizer: Any = MISSING  # {_target_, lr, ...}
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


ConfigStore.instance().store(name="schema", node=Config)


def typed(cfg: DictConfig) -> Config:
    """The composed config as plain dataclasses, checked across fields. Raises ConfigError."""
    values = escape(OmegaConf.to_container(cfg, resolve=True))  # resolved once, and not a second time
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    check(config)
    return config


def check(config: Config) -> None:
    """Raise ConfigError naming the first value that cannot work, and the mend. None (not yet known) passes."""
    _check_numbers(config)
    _check_choices(config)
    g = config.grpo
    if g.num_generations is not None and g.num_generations < 2:
        raise ConfigError(
            f"grpo.num_generations={g.num_generations}: a group of one has nothing to compare with, so its advantage "
            "is always 0; use 2 or more"
        )
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must lie between 0 and 2**63 - 1")
    compute = config.hardware.compute_dtype
    if config.model.dtype == "bfloat16" and compute not in (None, "bfloat16") and config.model.lora is None:
        raise ConfigError(
            f"hardware.compute_dtype={compute} has digits that model.dtype=bfloat16 has not: what they gain is rounded "
            "away from the weights; set model.dtype=float32, or hardware.compute_dtype=null"
        )
    _check_prompts(config.data)
    for key in ("beta", "epsilon"):
        if config.objective.get(key, getattr(g, key)) != getattr(g, key):
            raise ConfigError(f"objective.{key}={config.objective[key]}: set grpo.{key}, which it follows")
    if not config.reward.components:
        raise ConfigError("reward.components is empty: give at least one component with a _target_")
    for name, component in config.reward.components.items():
        key = f"reward.components.{name}"
        if not isinstance(component, dict) or not component.get("_target_"):
            raise ConfigError(f"{key} needs a _target_: the dotted path of its function")
        _number(f"{key}.weight", component.get("weight", 1.0))


def _check_prompts(data: dict[str, Any]) -> None:
    examples, system_prompt = data.get("examples"), data.get("system_prompt")
    if not isinstance(examples, list) or not all(
        isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("question", "completion"))
        for each in examples
    ):
        raise ConfigError("data.examples must be a list of {question: text, completion: text}, [] for none")
    if system_prompt is not None and not isinstance(system_prompt, str):
        raise ConfigError(f"data.system_prompt={system_prompt}: must be text, or null for none")


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


def _check_numbers(config: Config) -> None:
    flat = flatten(to_dict(config))
    at_least_1 = ["grpo.num_iterations", "grpo.num_steps", "grpo.batch_size", "grpo.mu", "grpo.max_completion_length"]
    at_least_1 += ["hardware.micro_batch_tokens", "hardware.rollout_tokens", "hardware.threads", "checkpoint.keep_last"]
    at_least_1 += ["eval.max_problems", "eval.max_completion_length", "until_step"]
    at_least_0 = ["grpo.beta", "grpo.warmup_steps", "rollout.min_new_tokens", "optimizer.lr"]
    at_least_0 += ["checkpoint.every", "checkpoint.keep_every", "samples.every", "eval.every"]
    at_least_0 += ["tracking.completions_every", "grpo.max_skipped_steps"]
    for key in ("optimizer.lr", "data.max_prompt_length"):
        _number(key, flat.get(key))
    for lowest, keys in ((1, at_least_1), (0, at_least_0)):
        for key in keys:
            if flat[key] is not None and not flat[key] >= lowest:  # so put, not-a-number fails too
                raise ConfigError(f"{key}={flat[key]}: must be {lowest} or more")
    if not 0 < config.grpo.epsilon < 1:
        raise ConfigError(f"grpo.epsilon={config.grpo.epsilon}: must lie between 0 and 1, usually 0.1 or 0.2")
    if config.reward.timeout_s is not None and not config.reward.timeout_s > 0:
        raise ConfigError(f"reward.timeout_s={config.reward.timeout_s}: must be above 0 seconds; null sets no limit")
    if config.sweep.eta < 2:
        raise ConfigError(f"sweep.eta={config.sweep.eta}: must be 2 or more, since the best 1/eta of the arms go on")
    if config.sweep.budget_hours is not None and not config.sweep.budget_hours > 0:
        raise ConfigError(f"sweep.budget_hours={config.sweep.budget_hours}: must be above 0; null sets no limit")
    if not config.grpo.max_grad_norm > 0:
        raise ConfigError(f"grpo.max_grad_norm={config.grpo.max_grad_norm}: must be above 0; 1e9 never clips")
    if not config.rollout.temperature > 0:
        raise ConfigError(
            f"rollout.temperature={config.rollout.temperature}: must be above 0; without randomness all completions "
            "of a group are the same"
        )


def _check_choices(config: Config) -> None:
    for key, allowed in {
        "resume": (True, False, "auto"),
        "reward.on_error": ("fail", "skip"),
        "grpo.lr_schedule": ("constant", "linear", "cosine"),
        "tracking.mode": ("auto", "online", "offline", "disabled"),
        "hardware.device": ("auto", "cuda", "mps", "cpu"),
        "hardware.compute_dtype": (None, "float32", "bfloat16", "float16"),
        "model.dtype": ("float32", "bfloat16"),
    }.items():
        value = flatten(to_dict(config))[key]
        if value not in allowed:
            raise ConfigError(f"{key}={_yaml(value)}: must be one of {', '.join(map(_yaml, allowed))}")
    check_device_map(config.model.device_map)
    lora = config.model.lora
    if lora is not None and (lora.rank < 1 or not lora.alpha > 0):
        raise ConfigError(f"model.lora.rank={lora.rank} and model.lora.alpha={lora.alpha:g}: must be above 0")
    modules = lora.target_modules if lora is not None else []
    if not modules == "all-linear" and not (isinstance(modules, list) and all(isinstance(m, str) for m in modules)):
        raise ConfigError(
            f"model.lora.target_modules={modules}: must be all-linear, or a list of layers' names such as "
            "[q_proj,v_proj]"
        )


def _number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key}={_yaml(value)}: must be a number")


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of our own; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def load_frozen(path: Path) -> DictConfig:
    """A run folder's config.yaml. Its values are data: nothing in them is interpolated again."""
    values = read_yaml(path, dict)
    hardware = values.get("hardware")
    if isinstance(hardware, dict) and "card" in hardware and hardware["card"] is None:  # as it once was written
        hardware["card"] = dict.fromkeys(("memory_gb", "tflops", "bandwidth_gb_s"))
    try:
        return OmegaConf.create(escape(values))
    except OmegaConfBaseException as error:  # such as a date
        raise FileError(f"{path} is not a config: {first_line(error)}") from error


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
    """The config as plain nested dicts."""
    return dataclasses.asdict(config)


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
