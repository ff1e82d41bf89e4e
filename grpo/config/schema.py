# ruff: noqa: RUF009  (key and group are functions that return fields)
"""The configuration's types, and what is known about each key. Values live in conf/*.yaml, other checks in checks.py.

Imports no torch: `--help`, `--cfg job` and every configuration error answer at once.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass(frozen=True)
class Facts:
    """What is known about a key beside its type. `check` reads the bounds, resume.py the rest."""

    least: float | None = None  # the smallest value allowed
    above: float | None = None  # every value must be larger than this
    between: tuple[float, float] | None = None  # every value must lie between these, and be neither
    choices: tuple[Any, ...] = ()  # empty: any value
    hint: str = ""  # what an error about the value adds
    # Whether a resumed run may change it: refused | free: how the run is watched and kept | rounding: the results stay
    # equal up to rounding | longer: only to add steps. Empty: as the group.
    on_resume: str = ""
    # Whether another choice of its group leaves it as it is in a resumed run: it must be named to be changed.
    kept_by_group: bool = False
    launch_only: bool = False  # about one launch, and never written to config.yaml; so are all keys of such a group
    names_function: bool = False  # a value with a dot is the path of a function, as that of a `_target_` is
    of_sweep: bool = False  # of such a key: the jobs of a sweep depend on it, so that sweep.json keeps it


def key(default: Any = MISSING, **facts: Any) -> Any:
    """A field of the schema with its Facts."""
    return field(default=default, metadata={"facts": Facts(**facts)})


def open_group(schema: type) -> Any:
    """A group that names a function with `_target_`: a dict with the fields of a schema and that function's own."""
    return field(default=MISSING, metadata={"facts": Facts(), "open": schema})


def group(schema: type, **facts: Any) -> Any:
    """A group of fields; `on_resume` and `launch_only` hold for the keys below it, too."""
    return field(default_factory=schema, metadata={"facts": Facts(**facts)})


@dataclass
class LoraSettings:
    """The adapter that is trained instead of all weights."""

    rank: int = key(least=1)
    alpha: float = key(above=0)  # what the adapter adds is scaled by alpha / rank
    target_modules: Any = MISSING  # all-linear, or a list of the last parts of layers' names
    init_from: str | None = MISSING  # folder of an adapter to begin with; None: one that adds nothing


@dataclass
class ModelConfig:
    """The model to train."""

    name: str = MISSING  # hub name, local folder, or `tiny` for the embedded model
    attn_implementation: str = MISSING  # eager | sdpa | flash_attention_2 | ..., passed to transformers
    # Of the weights and their optimizer state; hardware.compute_dtype is that of the arithmetic.
    dtype: str = key(choices=("float32", "bfloat16"))
    device_map: Any = key(on_resume="rounding")  # auto: hardware.device decides; else one device: cpu | mps | cuda:N
    trust_remote_code: bool = MISSING
    lora: LoraSettings | None = None  # None: all weights are trained


@dataclass
class GrpoConfig:
    """The algorithm's numbers; conf/grpo/default.yaml explains them."""

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


@dataclass
class CardConfig:
    """What plan=true counts on; all None: this machine, looked at."""

    memory_gb: float | None = MISSING
    tflops: float | None = MISSING  # in compute_dtype
    bandwidth_gb_s: float | None = MISSING


@dataclass
class HardwareConfig:
    """How the work is computed; three sizes are defaults of grpo.*."""

    device: str = key(choices=("auto", "cuda", "mps", "cpu"), on_resume="rounding")
    # None: as model.dtype; with float16 the loss is scaled.
    compute_dtype: str | None = key(
        choices=(None, "float32", "bfloat16", "float16"), on_resume="rounding", kept_by_group=True
    )
    batch_size: int | None = key(kept_by_group=True)
    num_generations: int | None = key(kept_by_group=True)
    max_completion_length: int | None = key(kept_by_group=True)
    micro_batch_tokens: int | None = key(least=1, on_resume="rounding")
    activation_checkpointing: bool | None = key(on_resume="rounding")
    rollout_tokens: int | None = key(least=1, on_resume="rounding")
    cuda_graphs: bool | None = key(default=None, on_resume="rounding")
    threads: int | None = key(least=1, on_resume="rounding")
    card: CardConfig = group(CardConfig, on_resume="free")


@dataclass
class RewardConfig:
    """The reward components, and what happens where one fails."""

    # Each component: {_target_, weight, and the function's own settings}. A dict, since users add their own.
    components: dict[str, Any] = MISSING
    timeout_s: float | None = key(above=0, hint="null sets no limit", on_resume="free")
    on_error: str = key(choices=("fail", "skip"), on_resume="free")


@dataclass
class DataConfig:
    """Of the prompts; the data set's loader has the other keys."""

    system_prompt: Any = MISSING
    examples: Any = MISSING
    max_prompt_length: int = key(least=1)


@dataclass
class ObjectiveConfig:
    """The choices (grpo/algorithm/objective.py) and their numbers, of which null follows grpo.*."""

    advantage: Any = key(default="group", names_function=True)
    ratio: Any = key(default="token", names_function=True)
    surrogate: Any = key(default="clip", names_function=True)
    reduction: Any = key(default="row", names_function=True)
    kl: Any = key(default="k3", names_function=True)
    beta: float | None = key(default=None, least=0)
    epsilon_low: float | None = key(default=None, between=(0, 1), hint="usually 0.1 or 0.2")
    epsilon_high: float | None = key(default=None, between=(0, 1), hint="usually 0.1 to 0.3")


@dataclass
class OptimizerConfig:
    """Of the optimizer; its class has the other keys."""

    lr: float = key(least=0)


@dataclass
class RolloutConfig:
    """How completions are drawn; the engine that draws them has the other keys."""

    temperature: float = key(above=0, hint="without randomness all completions of a group are the same")
    min_new_tokens: int = key(least=0)


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    mode: str = key(choices=("auto", "online", "offline", "disabled"))
    project: str = MISSING
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
class SamplesConfig:
    """Which steps have a file of completions."""

    every: int = key(least=0)


@dataclass
class EvalConfig:
    """Evaluation on the held-out problems."""

    every: int = key(least=0, on_resume="free")
    before: bool = MISSING
    after: bool = key(on_resume="free")
    max_problems: int | None = key(least=1)
    max_completion_length: int | None = key(least=1)
    accuracy: dict[str, Any] = MISSING


@dataclass
class SweepConfig:
    """Of successive halving."""

    budget_hours: float | None = key(default=None, above=0, hint="null sets no limit")
    eta: int = key(default=3, least=2, hint="the best 1/eta of the arms continue", of_sweep=True)


@dataclass
class Config:
    """One experiment, and the keys of one launch."""

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


# Of every key of the schema, by its dotted name.
FACTS = dict(_facts(Config, Facts(on_resume="refused"), ""))
LAUNCH_KEYS = frozenset(name for name, facts in FACTS.items() if facts.launch_only)
FUNCTION_KEYS = frozenset(name for name, facts in FACTS.items() if facts.names_function)
MORE_STEPS = frozenset(name for name, facts in FACTS.items() if facts.on_resume == "longer")
PASSING_KEYS = frozenset(name for name in LAUNCH_KEYS if not FACTS[name].of_sweep)


def on_resume(name: str) -> str:
    """What a resumed run may change of a key, as in Facts; of a group what holds for all keys below it."""
    found = {facts.on_resume for dotted, facts in FACTS.items() if f"{dotted}.".startswith(f"{name}.")}
    if found and found <= {"free", "rounding"}:
        return "rounding" if "rounding" in found else "free"
    return found.pop() if len(found) == 1 else "refused"


def known_keys(group: str) -> tuple[str, ...]:
    """The keys of an open group that are the suite's, and not those of the function that it names."""
    return tuple(each.name for each in dataclasses.fields(OPEN_GROUPS[group]))


ConfigStore.instance().store(name="schema", node=Config)
