"""`plan=true`: estimate memory, disk space and time of a run, or of each job of a sweep, without loading weights."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from grpo.batch import Completions, Prompts
from grpo.config.checks import Sizes, check_training, typed
from grpo.config.instantiate import bind
from grpo.config.objective_checks import kl_weight
from grpo.config.schema import Config
from grpo.data.problems import Problems
from grpo.data.splits import check_splits
from grpo.model.hardware import device_of, peak_memory_gb, resolve_hardware
from grpo.model.packed import checkpoint_layers, supports_packing
from grpo.planning import estimate
from grpo.rollout.compiled_decoder import supports_compiled_decoding
from grpo.training.experiment import build_experiment, compute_dtype
from grpo.training.preflight import MOST_GROUPS
from grpo.training.recorder import is_sampled
from grpo.training.update import Batch

GB = 1e9
# Step time divided by the time of its matrix products alone: measured on a CPU (tests/benchmarks/NOTES.md), assumed
# for other devices.
MEASURED_OVERHEAD = {("cpu", torch.float32): 1.7, ("cpu", torch.bfloat16): 2.3}
ASSUMED_OVERHEAD = 2.0
LAUNCH_S_PER_LAYER = 5e-4  # seconds to start the operations of one layer, per decoded token
# Memory that the C library holds in free fragments, relative to the activations. It counts only if no gradients of
# whole weights are allocated, which would use these fragments.
FRAGMENTATION = 0.5
START_S = 10.0  # seconds to start a process, load the model and write the results, assumed
BYTES_PER_SAMPLE = 1500  # of one completion in samples/, with its prompt and rewards
# With its optimizer, since one on the command line would replace it by one that rounds to the nearest.
SMALLER = "use tuning=lora, or tuning=full_bf16 optimizer=adamw_bf16, or lower hardware.micro_batch_tokens"


@dataclass(frozen=True)
class Plan:
    """The resources that one run needs. Memory and disk in bytes."""

    parameters: int  # of the model
    trained: int  # trained parameters, of the model or of the adapter
    memory: dict[str, float]  # by part; not all parts are allocated at the same time
    peak: float
    available: float  # memory of the device: of the preset's card, else of this machine
    disk: dict[str, float]  # by part
    steps: int
    tokens: float  # per step, counted as num_tokens: each prompt once per completion, completions at the length limit
    seconds: float  # per step; NaN if the rates of the device are unknown
    rest_seconds: float  # of a run besides its steps: start, pre-flight and evaluations
    title: str  # model, batch and number of steps

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of the device."""
        return self.peak <= self.available

    @property
    def hours(self) -> float:
        """Hours of a run: all steps, the start, the pre-flight and the evaluations."""
        return (self.seconds * self.steps + self.rest_seconds) / 3600

    @property
    def folder(self) -> float:
        """Bytes of the run folder after the run has finished."""
        return sum(size for part, size in self.disk.items() if part != "while saving")


def plan(config: Config) -> Plan:
    """Estimate the resources that a run of this config needs. Raises ConfigError if the run could not start."""
    check_training(config)
    experiment = build_experiment(config, use=False)
    check_splits(experiment.problems, config)
    _process_bytes()  # measured and cached here, since the code below allocates memory
    grpo = config.grpo
    sizes = experiment.sizes
    dtype = getattr(torch, config.model.dtype)
    compute = compute_dtype(config)
    model = estimate.meta_model(config.model, compute, experiment.max_length or 0)
    prompt_tokens = math.ceil(sum(experiment.prompt_lengths) / len(experiment.prompt_lengths))
    rows = sizes.batch_size * sizes.num_generations
    work = estimate.Work(sizes.batch_size, sizes.num_generations, prompt_tokens, [sizes.max_completion_length] * rows)

    trained, frozen = estimate.parameters(model)
    memory = _memory(config, sizes, model, work)
    resident = sum(memory[part] for part in ("process", "weights", "working copy", "reference", "optimizer"))
    sampling = memory["keys and values"] + memory["reordered weights"]
    # In the backward pass activations are freed while gradients are allocated. With several micro-batches, all
    # gradients have been allocated by the first one.
    several = len(micro_batches(work, sizes.micro_batch_tokens, supports_packing(model))) > 1
    freed = memory["activations"] + memory["fragmentation"] + memory["output head"]
    gradients = memory["gradients"]
    update = freed + gradients if several else max(freed, gradients) + min(freed, gradients) / 2
    peak = resident + memory["checkpoint copy"] + max(sampling, update)
    return Plan(
        parameters=frozen or trained,
        trained=trained,
        memory=memory,
        peak=peak,
        available=_available(config),
        disk=disk_space(config, trained * dtype.itemsize, memory["optimizer"], rows),
        steps=grpo.num_iterations * grpo.num_steps,
        tokens=rows * (prompt_tokens + sizes.max_completion_length),
        seconds=_seconds(config, model, work, compute),
        rest_seconds=_rest_seconds(config, model, work, compute, experiment.problems),
        title=f"model {config.model.name}, {_trained(config)}; per step {sizes.batch_size} prompts x "
        f"{sizes.num_generations} completions x {sizes.max_completion_length} tokens",
    )


def _trained(config: Config) -> str:
    lora = config.model.lora
    what = f"all weights in {config.model.dtype}" if lora is None else f"LoRA of rank {lora.rank}"
    return f"{what}, computed in {config.hardware.compute_dtype or config.model.dtype}"


def _memory(config: Config, sizes: Sizes, model: Any, work: estimate.Work) -> dict[str, float]:
    on_cpu = config.hardware.device == "cpu"
    largest = max(micro_batches(work, sizes.micro_batch_tokens, supports_packing(model)), key=len)
    prompts = len({int(row) // work.group_size for row in largest})
    length = max(work.lengths)
    rows = min(len(work.lengths), max(1, sizes.rollout_tokens // length))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    dtype = getattr(torch, config.model.dtype)
    compute = compute_dtype(config)
    trained, frozen = estimate.parameters(model)
    is_full = config.model.lora is None
    weights = trained * dtype.itemsize
    optimizer = _optimizer_bytes(config, model, dtype)
    copied = trained * (compute if is_full else dtype).itemsize  # of a second model, which shares the frozen weights
    compiled = _decoding_is_compiled(config, model, compute)
    activations = _activations(config, model, prompts, work.prompt_tokens, len(largest), length)
    return {
        "process": _process_bytes() if on_cpu else 0.0,
        "weights": weights + frozen * compute.itemsize,
        "working copy": copied if is_full and compute != dtype else 0.0,
        "reference": copied if kl_weight(config) > 0 else 0.0,
        "optimizer": optimizer,
        "gradients": weights,
        "activations": activations,
        "fragmentation": FRAGMENTATION * activations if on_cpu and not is_full else 0.0,
        "output head": max(estimate.head_bytes(model, config.hardware.device), 4 * 4 * rows * vocabulary),
        "keys and values": estimate.cache_bytes(
            model, work.prompts * work.prompt_tokens + rows * length, 4 if compiled else compute.itemsize
        ),
        "reordered weights": sum(estimate.products(model)) * compute.itemsize if on_cpu and not compiled else 0.0,
        "checkpoint copy": weights + optimizer if config.checkpoint.overlap and on_cpu else 0.0,
    }


def _activations(config: Config, model: Any, prompts: int, prompt_tokens: int, rows: int, tokens: int) -> float:
    shape = (prompts, prompt_tokens, rows, tokens, compute_dtype(config).itemsize)
    everything = estimate.activation_bytes(model, *shape)
    if not config.hardware.activation_checkpointing:
        return everything
    checkpoint_layers(model)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return estimate.activation_bytes(model, *shape) + everything / layers


@functools.cache
def _process_bytes() -> float:
    """Bytes of memory that this process takes with its libraries, before it allocates anything else."""
    return peak_memory_gb(torch.device("cpu")) * GB


def micro_batches(work: estimate.Work, token_budget: int, shared: bool) -> list[torch.Tensor]:
    """The micro-batches into which training would split this work, as the rows of each."""
    rows = len(work.lengths)
    longest = max(work.lengths)
    prompts = torch.ones(work.prompts, work.prompt_tokens, dtype=torch.long)
    completions = torch.ones(rows, longest, dtype=torch.long)
    group = torch.arange(work.prompts).repeat_interleave(work.group_size)
    batch = Batch(
        Prompts(prompts, prompts), Completions(completions, completions, completions, group), torch.zeros(rows)
    )
    return batch.micro_batches(token_budget, shared)


def _optimizer_bytes(config: Config, model: Any, dtype: torch.dtype) -> float:
    """Bytes of the optimizer's state, extrapolated from a step on smaller copies of the model's parameters."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    small = {
        name: torch.nn.Parameter(torch.zeros([min(size, 256) for size in parameter.shape], dtype=dtype))
        for name, parameter in trained.items()
    }
    optimizer = bind("optimizer", config.optimizer)(list(small.items()))
    for parameter in small.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    total = 0.0
    for name, parameter in small.items():
        kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        size = sum(value.numel() * value.itemsize for value in kept if value.dim())
        total += size / parameter.numel() * trained[name].numel()
    return total


def disk_space(config: Config, weights: float, optimizer: float, rows: int) -> dict[str, float]:
    """Bytes of the parts of the finished run's folder; `while saving`: of one more checkpoint while it is written."""
    keep = config.checkpoint
    grpo = config.grpo
    steps = grpo.num_iterations * grpo.num_steps
    kept = min(keep.keep_last, math.ceil(steps / keep.every) if keep.every else 1)
    kept += steps // keep.keep_every if keep.keep_every else 0
    reference = weights if grpo.num_iterations > 1 and kl_weight(config) > 0 else 0.0
    sampled = sum(is_sampled(step, config.samples.every, steps) for step in range(1, steps + 1))
    return {
        "checkpoints": kept * (weights + optimizer) + reference,
        "best": weights if keep.keep_best and config.eval.every else 0.0,
        "final model": weights,
        "samples": float(sampled * rows * BYTES_PER_SAMPLE),
        "while saving": weights + optimizer,
    }


def _available(config: Config) -> float:
    """Bytes of memory of the preset's card or, if the preset has none, of the device of this machine."""
    if config.hardware.card.memory_gb is not None:
        return config.hardware.card.memory_gb * GB
    device = device_of(config)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rates(config: Config, compute: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes per second of the device; NaN if they are unknown."""
    device = config.hardware.device
    card = config.hardware.card
    if card.tflops is not None and card.bandwidth_gb_s is not None:
        return card.tflops * 1e12, card.bandwidth_gb_s * GB
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        torch.set_num_threads(config.hardware.threads or torch.get_num_threads())
        return _measured_rates(compute, device_of(config), torch.get_num_threads())
    return math.nan, math.nan


@functools.cache
def _measured_rates(compute: torch.dtype, device: torch.device, threads: int) -> tuple[float, float]:
    """Measured once for all points of a sweep with the same dtype, device and number of threads."""
    return estimate.machine_rates(compute, device)


def _seconds(config: Config, model: Any, work: estimate.Work, compute: torch.dtype) -> float:
    """Seconds of a step, NaN if the rates of the device are unknown: of sampling, and of the other matrix products."""
    (flops, _) = _rates(config, compute)
    trained = work
    if config.grpo.train_on is not None:
        rows = work.prompts * config.grpo.train_on
        trained = replace(work, group_size=config.grpo.train_on, lengths=work.lengths[:rows])
    with_updates = estimate.step_flops(model, trained, kl_weight(config) > 0, config.grpo.mu)
    rest = with_updates - estimate.forward_flops(model, trained)
    return _sampling_seconds(config, model, work, compute) + _overhead(config, compute) * rest / flops


def _sampling_seconds(config: Config, model: Any, work: estimate.Work, compute: torch.dtype) -> float:
    """Seconds to sample completions: matrix products or reading weights, with the overhead, and starting operations."""
    compiled = _decoding_is_compiled(config, model, compute)
    (flops, read) = _rates(config, torch.float32 if compiled else compute)  # the C code multiplies in float32
    decoding = max(
        estimate.forward_flops(model, work) / flops, estimate.decode_bytes(model, work, compute.itemsize) / read
    )
    starting = 0.0
    if not compiled:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        starting = LAUNCH_S_PER_LAYER * layers * max(work.lengths)
    return _overhead(config, compute) * decoding + starting


def _decoding_is_compiled(config: Config, model: Any, compute: torch.dtype) -> bool:
    hardware = config.hardware
    wanted = bool(hardware.compiled_decoding) and hardware.device == "cpu"
    return wanted and supports_packing(model) and supports_compiled_decoding(model, compute)


def _overhead(config: Config, compute: torch.dtype) -> float:
    return MEASURED_OVERHEAD.get((config.hardware.device, compute), ASSUMED_OVERHEAD)


def _rest_seconds(config: Config, model: Any, work: estimate.Work, compute: torch.dtype, problems: Problems) -> float:
    """Seconds of a run besides its steps, with completions of full length."""
    seconds = START_S
    if config.preflight:
        groups = min(work.prompts, MOST_GROUPS)
        lengths = work.lengths[: groups * work.group_size]
        sampled = estimate.Work(groups, work.group_size, work.prompt_tokens, lengths)
        seconds += _sampling_seconds(config, model, sampled, compute)
    steps = config.grpo.num_iterations * config.grpo.num_steps
    curve = config.eval.every and problems.validation
    during = steps // config.eval.every + bool(config.eval.before and curve) if config.eval.every else 0
    at_end = bool(config.eval.after and problems.validation and (not config.eval.every or steps % config.eval.every))
    length = config.eval.max_completion_length or max(work.lengths)
    for split, evaluations in (
        (problems.test, config.eval.before + config.eval.after),
        (getattr(problems, problems.split_to_choose_by), during + at_end),
    ):
        count = len(split[: config.eval.max_problems]) * config.eval.samples
        if count and evaluations:
            at_once = min(count, max(1, (config.hardware.rollout_tokens or length) // length))
            batch = estimate.Work(at_once, 1, work.prompt_tokens, [length] * at_once)
            seconds += evaluations * count / at_once * _sampling_seconds(config, model, batch, compute)
    return seconds


def resolved(cfg: DictConfig) -> Config:
    """The config with its hardware settings filled in. The card of a preset need not be in this machine."""
    if cfg.hardware.device == "cpu" or cfg.hardware.card.memory_gb is None:
        resolve_hardware(cfg)
    return typed(cfg)


def print_plans(points: Sequence[tuple[str, str, DictConfig]]) -> bool:
    """Print the plans of runs: one in full, several as a table with their time and disk. Returns whether all fit.

    points: name of the run, its hardware preset, and its composed config.
    """
    plans = [(name, plan(resolved(cfg))) for name, _, cfg in points]
    # Lines are not wrapped here but by the terminal, so that the names are complete if the output goes to a pipe.
    console = Console(width=1000, soft_wrap=True, markup=False, emoji=False)
    largest = max((each for _, each in plans), key=lambda each: each.peak)
    if len(plans) > 1:
        _print_points(console, plans, largest)
    preset = next(preset for (_, preset, _), (_, each) in zip(points, plans, strict=True) if each is largest)
    console.print(f"{preset}: {largest.title}, {largest.steps} steps")
    _print_memory(console, largest)
    if len(plans) == 1:
        _print_disk_and_time(console, largest)
    return all(each.fits for _, each in plans)


def _print_points(console: Console, plans: Sequence[tuple[str, Plan]], largest: Plan) -> None:
    numbers = ("parameters", "peak GB", "disk GB", "tokens/step", "s/step", "hours")
    table = Table(*(Column(name, justify="right") for name in numbers), "fits", "run", box=None, pad_edge=False)
    for name, each in plans:
        sizes = [f"{each.parameters / 1e6:,.1f} M", _gb(each.peak), _gb(each.folder), f"{each.tokens:,.0f}"]
        table.add_row(*sizes, _about(each.seconds), _about(each.hours), "yes" if each.fits else "no", name)
    console.print(table)
    hours = sum(each.hours for _, each in plans)
    disk = sum(each.folder for _, each in plans) + largest.disk["while saving"]
    console.print(f"time of all {len(plans)} runs: {_about(hours)} hours of jobs")
    console.print(f"disk of all {len(plans)} runs: {_gb(disk)} GB; the parts of the largest in memory:")


def _print_memory(console: Console, one: Plan) -> None:
    table = Table("memory", Column("GB", justify="right"), box=SIMPLE)
    for part, size in [*one.memory.items(), ("peak", one.peak)]:
        if size:
            table.add_row(part, _gb(size))
    console.print(table)
    console.print(
        "the peak is below the sum: activations are allocated after keys, values and reordered weights are freed"
    )
    adapter = "" if one.trained == one.parameters else f" and an adapter of {one.trained / 1e6:,.1f} million"
    console.print(f"{one.parameters / 1e6:,.1f} million parameters{adapter}")
    fits = "fits" if one.fits else f"does not fit; {SMALLER}"
    console.print(f"peak memory {_gb(one.peak)} of {_gb(one.available)} GB: {fits}")


def _print_disk_and_time(console: Console, one: Plan) -> None:
    parts = ", ".join(f"{part} {_gb(size)} GB" for part, size in one.disk.items() if size)
    console.print(f"disk: {_gb(sum(one.disk.values()))} GB ({parts})")
    console.print(
        f"{one.tokens:,.0f} tokens per step at most, {_about(one.seconds)} seconds per step (an estimate), "
        f"{one.steps} steps: {_about(one.seconds * one.steps / 3600)} hours"
    )
    console.print(
        f"start, pre-flight and evaluations {_about(one.rest_seconds / 60)} minutes; in all {_about(one.hours)} hours"
    )


def _gb(size: float) -> str:
    return f"{size / GB:.3g}"


def _about(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
