"""Verify a run folder: replay some of its steps and compare every number, and check every checksum.

python -m grpo verify run_dir=outputs/...                from the last checkpoint that has steps after it
python -m grpo verify run_dir=outputs/... step=N         up to step N, from the last checkpoint before it
Prints "equal" and exits with 0, or the first difference and exits with 1. It changes nothing in the folder.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo.commands._common import changed_config, own_arguments, resolved, run_folder_of
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.runs.files import step_of
from grpo.runs.folder import RunFolder
from grpo.runs.stop_signals import Exit

NOT_COMPARED = ("step_time", "timing_s/", "perf/")  # times and memory, which depend on the machine


def main(arguments: list[str]) -> None:
    """Verify and print the verdict. Raises Exit(1) if something differs."""
    own, given = own_arguments(arguments, ["run_dir", "step"])
    overrides = Overrides(given)
    folder = run_folder_of(arguments)
    if folder is None:
        raise ConfigError("verify needs a run folder: python -m grpo verify run_dir=outputs/...")
    ready = resolved(changed_config(folder, overrides))
    damaged = check_manifests(folder)
    start, end = span(folder, own.get("step"))
    seconds = sum(row.get("step_time", 0.0) for row in folder.metrics() if start < row["step"] <= end)
    print(f"replaying steps {start + 1} to {end}, which took {seconds:.0f} s in the run", flush=True)
    difference, compared = replay(folder, ready, start, end)
    if difference is not None:
        print(f"different: {difference}")
        for line in environment_changes(folder):
            print(line)
    else:
        print(f"equal: steps {start + 1} to {end}: every completion and metric{compared}")
    if difference is not None or damaged:
        raise Exit(1)


def check_manifests(folder: RunFolder) -> int:
    """Check every checkpoint against its manifest; print the damaged ones and return their number."""
    from grpo.runs.checkpoint import find_damage, step_folders

    others = [*folder.checkpoints.glob("reference_*"), folder.checkpoints / "best"]
    checked = [*step_folders(folder.checkpoints), *(p for p in others if p.is_dir() and not p.suffix)]
    problems = {path.name: find_damage(path) for path in checked}
    damaged = {name: problem for name, problem in problems.items() if problem is not None}
    for name, problem in damaged.items():
        print(f"damaged: checkpoints/{name}: {problem}")
    print(f"checksums: {len(checked) - len(damaged)} of {len(checked)} checkpoint folders are intact")
    return len(damaged)


def span(folder: RunFolder, step: str | None) -> tuple[int, int]:
    """The steps to replay, as (start, end): from start + 1 to end. Start is a checkpoint or where the run began."""
    from grpo.runs.checkpoint import find_damage, step_folders

    steps = [row["step"] for row in folder.metrics()]
    rows = len(steps)
    if rows == 0:
        raise ConfigError(f"{folder.path} has no completed step to replay")
    if steps != list(range(1, rows + 1)):
        raise ConfigError(f"{folder.metrics_file} has gaps or repetitions: it must have one row for each step")
    kept = [step_of(path) for path in step_folders(folder.checkpoints) if find_damage(path) is None]
    if step is None:
        start = max((s for s in kept if s < rows), default=_first(folder))
        return start, min((s for s in kept if s > start), default=rows)
    if not step.isdecimal() or not _first(folder) < int(step) <= rows:
        raise ConfigError(f"step={step}: must be one of the completed steps, {_first(folder) + 1} to {rows}")
    return max((s for s in kept if s < int(step)), default=_first(folder)), int(step)


def _first(folder: RunFolder) -> int:
    """The step at which the run began: 0, or for a fork that of its parent's checkpoint."""
    return (folder.frozen_config().get("parent") or {}).get("step", 0)


def replay(folder: RunFolder, config: Any, start: int, end: int) -> tuple[str | None, str]:
    """Replay the steps from start + 1 to end.

    Returns the first difference as text, or None, and a text that says what was compared in addition to the rows.
    """
    from grpo.runs.checkpoint import read_checkpoint, step_folder
    from grpo.training.digests import check_digests, digests_of
    from grpo.training.experiment import build_experiment
    from grpo.training.trainer import Trainer

    trainer = Trainer(build_experiment(config))
    with closing(trainer.engine):
        check_digests(folder, digests_of(trainer.experiment, folder, trainer.master), (), config.accept_changes)
        if start > 0:
            checkpoint = step_folder(folder.checkpoints, start)
            if not checkpoint.exists():
                raise ConfigError(
                    f"the checkpoint of step {start}, where this fork began, is not kept; name a later step"
                )
            trainer.load_state_dict(read_checkpoint(checkpoint))
        recorded = {row["step"]: row for row in folder.metrics()}
        for step in range(start + 1, end + 1):
            row = json.loads(json.dumps(trainer.step(step).row))
            for key, before in sorted(recorded[step].items()):  # an earlier version may have lacked a metric
                now = row.get(key)
                if before != now and not key.startswith(NOT_COMPARED):
                    return f"step {step}, {key}: {before} in the folder, {now} now", ""
        return _compare_state(trainer, step_folder(folder.checkpoints, end))


def _compare_state(trainer: Any, checkpoint: Path) -> tuple[str | None, str]:
    from grpo.runs.checkpoint import find_damage, read_checkpoint, weights_of

    if not checkpoint.exists() or find_damage(checkpoint) is not None:
        return None, "; no intact checkpoint of that step is kept, so weights were not compared"
    stored = read_checkpoint(checkpoint)
    present = trainer.state_dict()
    stored_state = vars(stored["trainer"])
    state = vars(present["trainer"])
    for name in ("step", "iteration", "num_tokens", "best_reward", "skipped_in_a_row", "loss_scale"):
        if stored_state[name] != state[name]:
            return f"step {trainer.state.step}, {name}: {stored_state[name]} in the folder, {state[name]} now", ""
    parts = ["model", "optimizer"]
    if stored["reference"] is not None and trainer.reference is not None:
        parts.append("reference")
        present["reference"] = weights_of(trainer.reference)
    for part in parts:
        for name, tensor in stored[part].items():
            if name not in present[part] or not _same_bits(tensor, present[part][name]):
                return f"step {trainer.state.step}, {part}: {name}", ""
        if missing := present[part].keys() - stored[part].keys():
            return f"step {trainer.state.step}, {part}: the checkpoint lacks {min(missing)}", ""
    return None, f", and the checkpoint of step {trainer.state.step}: {', '.join(parts)}, progress"


def _same_bits(one: Any, other: Any) -> bool:
    import torch

    other = other.detach().cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # Compared as bytes, since a NaN is not equal to itself as a number.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def environment_changes(folder: RunFolder) -> list[str]:
    """Differences from the run's hardware, versions and settings that can change rounding, one line each."""
    from grpo.model.hardware import device_of  # imports torch
    from grpo.runs.checkpoint import load_state
    from grpo.runs.environment import environment

    launches = folder.launches()
    here = environment(device_of(resolved(folder.frozen_config())))
    then = launches[-1].get("environment", {}) if launches else {}
    lines = [f"here {name} is {here.get(name)}, in the run it was {value}" for name, value in then.items()]
    lines = [line for line, name in zip(lines, then, strict=True) if here.get(name) != then[name]]
    changed = [key for key in folder.changes() if key.startswith("hardware.")]
    if changed:
        lines.append(f"a later launch split the work differently ({', '.join(changed)}): steps before that may differ")
    states = [load_state(file.parent) for file in folder.checkpoints.glob("step_*/trainer_state.json")]
    if any(isinstance(part, dict) and "to" in part for state in states for part in state.states.values()):
        lines.append("memory ran out in the run, and fewer tokens were processed at once from then on")
    return lines
