# ruff: noqa: RUF009  (key and group are functions that return fields)
"""The types of the config, and the constraints on each key. Values are in conf/*.yaml, other checks in checks.py.

This module does not import torch, so that `--help`, `--cfg job` and config errors appear without delay.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass(frozen=True)
class Facts:
    """Properties of a key other than its type: its valid values, and how launches, resumes and sweeps treat it."""

    least: float | None = None  # the smallest valid value
    above: float | None = None  # valid values are larger than this
    most: float | None = None  # the largest valid value
    between: tuple[float, float] | None = None  # valid values are between these, exclusively
    choices: tuple[Any, ...] = ()  # the valid values; empty: any value
    hint: str = ""  # added to an error about the value
    # Whether a resumed run may change the key. refused: no; free: yes, since it only affects monitoring and storage;
    # rounding: yes, since results stay equal up to rounding; longer: only to add steps. Empty: the same as its group.
    on_resume: str = ""
    # Whether a resumed run keeps the value when another choice of the group is given, unless the key itself is set.
    kept_by_group: bool = False
    launch_only: bool = False  # concerns a single launch, and is never written to config.yaml; a group: all its keys
    of_target: str | None = None  # the other facts hold if the `_target_` of the key's group is this one; None: always
    names_function: bool = False  # a value with a dot is the path of a function, like the value of `_target_`
    of_sweep: bool = False  # for a launch_only key: the jobs of a sweep depend on it, so sweep.json keeps it


def key(default: Any = MISSING, **facts: Any) -> Any:
    """A dataclass field for a key, with its Facts."""
    return field(default=default, metadata={"facts": Facts(**facts)})


def open_group(schema: type) -> Any:
    """A field for a group with a `_target_`: a dict with the keys of `schema` and the settings of that function."""
    return field(default=MISSING, metadata={"facts": Facts(), "open": schema})


def group(schema: type, **facts: Any) -> Any:
    """A dataclass field for a group; `on_resume` and `launch_only` also apply to the keys below it."""
    return field(default_factory=schema, metadata={"facts": Facts(**facts)})


@dataclass
class LoraSettings:
    """The adapter that is trained instead of all weights."""

    rank: int = key(least=1)
    alpha: float = key(above=0)  # the adapter's output is scaled by alpha / rank
    target_modules: Any = MISSING  # all-linear, or a list of the last parts of layer names
    init_from: str | None = MISSING  # folder of an adapter to start from; None: a new one, whose output is 0


@dataclass
class ModelConfig:
    """The model to train."""

    name: str = MISSING  # hub name, local folder, or `tiny` for the embedded model
    attn_implementation: str = MISSING  # eager | sdpa | flash_attention_2 | ..., passed to transformers
    # Data type of the weights and the optimizer state; hardware.compute_dtype is that of the computation.
    dtype: str = key(choices=("float32", "bfloat16"))
    device_map: Any = key(on_resume="rounding")  # auto: hardware.device decides; else one device: cpu | mps | cuda:N
    trust_remote_code: bool = MISSING
    lora: LoraSettings | None = None  # None: all weights are trained


@dataclass
class GrpoConfig:
    """The hyperparameters of the algorithm; conf/grpo/default.yaml explains them."""

    num_iterations: int = key(least=1, on_resume="longer")
    num_steps: int = key(least=1, on_resume="longer")
    batch_size: int | None = key(least=1)  # None until hardware=auto is resolved, when the run starts
    num_generations: int | None = key(
        least=2, hint="a group of one has nothing to compare with, so its advantage is always 0"
    )
    max_completion_length: int | None = key(least=1)
    beta: float = key(least=0)
    mu: int = key(least=1)
    epsilon: float = key(between=(0, 1), hint="usually 0.1 or 0.2")
    max_grad_norm: float = key(above=0, hint="1e9 never clips")
    lr_schedule: str = key(choices=("constant", "linear", "cosine"))
    warmup_steps: int = key(least=0)
    max_skipped_steps: int = key(least=0, on_resume="free")
    decay_biases_and_norms: bool = key()
    mask_truncated_completions: bool = key()
    train_on: int | None = key(least=1)


@dataclass
class CardConfig:
    """The data sheet of the card that plan=true assumes. None: plan=true uses this machine."""

    memory_gb: float | None = MISSING
    tflops: float | None = MISSING  # in compute_dtype
    bandwidth_gb_s: float | None = MISSING


@dataclass
class HardwareConfig:
    """How the run is computed. batch_size, num_generations and max_completion_length are the defaults of grpo.*."""

    device: str = key(choices=("auto", "cuda", "mps", "cpu"), on_resume="rounding")
    # None: the same as model.dtype. With float16 the loss is scaled.
    compute_dtype: str | None = key(
        choices=(None, "float32", "bfloat16", "float16"), on_resume="rounding", kept_by_group=True
    )
    batch_size: int | None = key(kept_by_group=True)
    num_generations: int | None = key(kept_by_group=True)
    max_completion_length: int | None = key(kept_by_group=True)
    micro_batch_tokens: int | None = key(least=1, on_resume="rounding")
    activation_checkpointing: bool | None = key(on_resume="rounding")
    rollout_tokens: int | None = key(least=1, on_resume="rounding")
    compiled_decoding: bool | None = key(default=None, on_resume="rounding")
    threads: int | None = key(least=1, on_resume="rounding")
    card: CardConfig = group(CardConfig, on_resume="free")


@dataclass
class RewardConfig:
    """The reward components, and what happens if one fails."""

    # Each component: {_target_, weight, and the function's own settings}. A dict, since users add their own.
    components: dict[str, Any] = MISSING
    timeout_s: float | None = key(above=0, hint="null sets no limit", on_resume="free")
    on_error: str = key(choices=("fail", "skip"), on_resume="free")
    isolate: bool = key(default=True, on_resume="free")


@dataclass
class DataConfig:
    """The prompts. The other keys of the group are arguments of the dataset's loader."""

    system_prompt: Any = MISSING
    examples: Any = MISSING
    max_prompt_length: int = key(least=1)
    validation_share: float = key(default=0.05, least=0, hint="0 keeps no validation problems")
    # The parts of a mixture, each a group data with a weight, by name: grpo/data/mixture.py.
    parts: Any = None
    template_arguments: Any = None  # variables of the model's chat template, such as {enable_thinking: false}


OBJECTIVE = "grpo.algorithm.objective.Objective"  # the objective of the suite
SAMPLING_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass
class ObjectiveConfig:
    """The choices (see grpo/algorithm/objective.py) and their numbers; a number that is null follows grpo.*."""

    advantage: Any = key(default="group", names_function=True)
    ratio: Any = key(default="token", names_function=True)
    surrogate: Any = key(default="clip", names_function=True)
    reduction: Any = key(default="row", names_function=True)
    kl: Any = key(default="k3", names_function=True)
    beta: float | None = key(default=None, least=0)
    epsilon_low: float | None = key(default=None, between=(0, 1), hint="usually 0.1 or 0.2")
    epsilon_high: float | None = key(default=None, between=(0, 1), hint="usually 0.1 to 0.3")
    kl_correction: bool = key(default=False, of_target=OBJECTIVE)
    entropy_weight: float = key(default=0.0, least=0, of_target=OBJECTIVE)
    sampling_correction: str | None = key(default=None, choices=(None, *SAMPLING_CORRECTIONS), of_target=OBJECTIVE)
    sampling_cap: float = key(default=3.0, least=1, hint="else also a ratio of 1 would be limited", of_target=OBJECTIVE)
    delta: float | None = key(default=None, above=1, hint="usually 4", of_target=OBJECTIVE)
    cap: float = key(default=5.0, least=1, hint="else also a ratio of 1 would be limited", of_target=OBJECTIVE)
    tau_positive: float = key(default=1.0, above=0, of_target=OBJECTIVE)
    tau_negative: float = key(default=1.05, above=0, of_target=OBJECTIVE)


@dataclass
class OptimizerConfig:
    """The optimizer. The other keys of the group are arguments of its class."""

    lr: float = key(least=0)


@dataclass
class RolloutConfig:
    """How completions are sampled. The other keys of the group are arguments of the rollout engine."""

    temperature: float = key(above=0, hint="without randomness all completions of a group are the same")
    min_new_tokens: int = key(least=0)


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: str = key(choices=("auto", "online", "offline", "disabled"))
    project: str | None = MISSING
    entity: str | None = MISSING
    group: str | None = key(kept_by_group=True)
    name: str | None = key(default=None, kept_by_group=True)
    job_type: str = MISSING
    tags: list[str] = key(kept_by_group=True)
    init_timeout: float = MISSING
    completions_every: int = key(least=0)


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every: int = key(least=0)
    keep_last: int = key(least=1)
    keep_every: int = key(least=0)
    keep_best: bool = MISSING
    overlap: bool = MISSING


@dataclass
class SamplingConfig:
    """Which groups of completions are trained on."""

    refill: int = key(default=0, least=0)
    curriculum: float = key(default=0.0, least=0, most=0.99, hint="with 1 a solved problem would never come again")


@dataclass
class SamplesConfig:
    """For which steps the completions are written to a file."""

    every: int = key(least=0)


@dataclass
class EvalConfig:
    """Evaluation on the validation and test problems."""

    every: int = key(least=0, on_resume="free")
    before: bool = MISSING
    after: bool = key(on_resume="free")
    max_problems: int | None = key(least=1)
    max_completion_length: int | None = key(least=1)
    samples: int = key(default=1, least=1)
    temperature: float = key(default=0.0, least=0)
    by: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    accuracy: dict[str, Any] = MISSING
    graders: dict[str, Any] = field(default_factory=dict)


@dataclass
class TargetConfig:
    """An accuracy to reach on the validation problems."""

    accuracy: float | None = key(default=None, above=0, most=1, hint="a share, such as 0.9")
    stop: bool = True


@dataclass
class SweepConfig:
    """Settings of successive halving."""

    budget_hours: float | None = key(default=None, above=0, hint="null sets no limit")
    eta: int = key(default=3, least=2, hint="the best 1/eta of the arms continue", of_sweep=True)


@dataclass
class Config:
    """The config of one experiment, and the keys of one launch."""

    name: str = MISSING
    seed: int = MISSING
    run_dir: str | None = key(default=None, launch_only=True, of_sweep=True)
    resume: Any = key(default=False, choices=(True, False, "auto"), launch_only=True)
    sweep_dir: str | None = key(default=None, launch_only=True)
    fork: bool = key(default=False, launch_only=True, of_sweep=True)
    fork_step: Any = key(default=None, launch_only=True, of_sweep=True)
    plan: bool = key(default=False, launch_only=True)
    accept_changes: bool = key(default=False, launch_only=True)
    until_step: int | None = key(default=None, least=1, launch_only=True)
    sweep: SweepConfig = group(SweepConfig, launch_only=True)
    parent: dict[str, Any] | None = MISSING
    preflight: bool = key(default=True, on_resume="free")
    deterministic: bool = MISSING
    checkpoint: CheckpointConfig = group(CheckpointConfig, on_resume="free")
    sampling: SamplingConfig = group(SamplingConfig)
    samples: SamplesConfig = group(SamplesConfig, on_resume="free")
    eval: EvalConfig = group(EvalConfig)
    target: TargetConfig = group(TargetConfig, on_resume="free")
    model: ModelConfig = group(ModelConfig)
    data: Any = open_group(DataConfig)
    reward: RewardConfig = group(RewardConfig)
    grpo: GrpoConfig = group(GrpoConfig)
    objective: Any = open_group(ObjectiveConfig)
    optimizer: Any = open_group(OptimizerConfig)
    hardware: HardwareConfig = group(HardwareConfig)
    rollout: Any = open_group(RolloutConfig)
    tracking: TrackingConfig = group(TrackingConfig, on_resume="free")


OPTIONAL_GROUPS: set[str] = set()  # groups that may be null, by dotted name
OPEN_GROUPS: dict[str, type] = {}  # the schema of each open group, by dotted name


def _facts(schema: type, above: Facts, prefix: str) -> Iterator[tuple[str, Facts]]:
    types = get_type_hints(schema)
    for each in dataclasses.fields(schema):
        own = each.metadata.get("facts", Facts())
        own = replace(own, on_resume=own.on_resume or above.on_resume, launch_only=own.launch_only or above.launch_only)
        dotted = f"{prefix}{each.name}"
        possible = (types[each.name], *get_args(types[each.name]))
        inner = [one for one in possible if isinstance(one, type) and dataclasses.is_dataclass(one)]
        if "open" in each.metadata:
            OPEN_GROUPS[dotted] = each.metadata["open"]
            yield dotted, own
            yield from _facts(OPEN_GROUPS[dotted], own, f"{dotted}.")
        elif inner:
            if type(None) in get_args(types[each.name]):
                OPTIONAL_GROUPS.add(dotted)
            yield from _facts(inner[0], own, f"{dotted}.")
        else:
            yield dotted, own


# The Facts of every key of the schema, by dotted name.
FACTS = dict(_facts(Config, Facts(on_resume="refused"), ""))
LAUNCH_KEYS = frozenset(name for name, facts in FACTS.items() if facts.launch_only)
FUNCTION_KEYS = frozenset(name for name, facts in FACTS.items() if facts.names_function)
MORE_STEPS = frozenset(name for name, facts in FACTS.items() if facts.on_resume == "longer")
PROMPT_KEYS = ("system_prompt", "examples", "template_arguments")  # those of the group data that change prompts
PASSING_KEYS = frozenset(name for name in LAUNCH_KEYS if not FACTS[name].of_sweep)


def on_resume(name: str) -> str:
    """`Facts.on_resume` of a key; for a group, the value that is valid for all keys below it."""
    found = {facts.on_resume for dotted, facts in FACTS.items() if f"{dotted}.".startswith(f"{name}.")}
    if found and found <= {"free", "rounding"}:
        return "rounding" if "rounding" in found else "free"
    return found.pop() if len(found) == 1 else "refused"


def known_keys(group: str) -> tuple[str, ...]:
    """The keys of an open group that belong to the suite, not to the function of its `_target_`."""
    return tuple(each.name for each in dataclasses.fields(OPEN_GROUPS[group]))


def _if_lora(lora: Any, full: Any, *, _root_: DictConfig) -> Any:
    """The first value if an adapter is trained, else the second: `${if_lora:2.0e-3,2.0e-4}` in an experiment."""
    return full if OmegaConf.select(_root_, "model.lora") is None else lora


ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("if_lora", _if_lora, replace=True)
