"""Checkpoints: written atomically, verified by checksum, and read without executing code.

`checkpoints/step_000050/` contains model.safetensors, optimizer.safetensors, trainer_state.json and manifest.json. The
manifest is written last. `reference_000002/` contains the frozen reference of outer iteration 2, which all checkpoints
of that iteration share (in iteration 1 it is the starting model). `best/` contains the weights with the best validation
accuracy.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grpo.config.errors import ConfigError, FileError, first_line
from grpo.config.migrations import STATE_STEPS, VERSION
from grpo.runs.files import commit_folder, discard, read_dataclass, read_json, restore_replaced, step_of, write_atomic

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
NAME = r"(step_\d{6,}|reference_\d{6,}|best)"  # folders that a run writes to checkpoints/


@dataclass
class TrainerState:
    """The state of training after a step. It has no random state: the noise of a step depends on its number."""

    step: int = 0  # completed steps over all iterations
    iteration: int = 0  # outer iteration of that step, from 1
    num_tokens: int = 0  # prompt and completion tokens seen so far
    best_reward: float | None = None  # highest mean reward of a step
    best_accuracy: float | None = None  # highest accuracy on the problems to choose by
    evaluated_step: int = 0  # the last step evaluated because of `eval.every`
    skipped_in_a_row: int = 0  # consecutive skipped steps up to this one; their update was not finite
    loss_scale: dict[str, Any] | None = None  # fields of `LossScale`, if the computation is in float16
    # States by name: of the rollout engine, if it has one, and of token budgets that were reduced
    # after running out of memory, such as {"update": {"from": configured tokens, "to": tokens in use}}.
    states: dict[str, Any] = field(default_factory=dict)
    engine: str = ""  # rollout._target_ of the engine whose state is states["rollout"]


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step_{step:06d}"


def reference_folder(folder: Path, iteration: int) -> Path:
    """The folder of the reference of an outer iteration."""
    return folder / f"reference_{iteration:06d}"


def write_checkpoint(
    target: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    state: TrainerState | None = None,
    reference: Path | None = None,
) -> None:
    """Write the folder `target` atomically: write a temporary folder, sync it to disk, then rename it.

    tensors: by file name without the suffix. reference: the folder, next to `target`, of the reference that the
    checkpoint needs. Raises OSError; if the disk has too little space, before anything is written.
    """
    text = None if state is None else json.dumps({"version": VERSION, **asdict(state)}, indent=2)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear(target.parent)
    _check_space(target.parent, sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()))
    temporary = _free_name(target)
    temporary.mkdir()
    try:
        for name, group in tensors.items():
            save_file(group, temporary / f"{name}.safetensors")
        if text is not None:
            (temporary / STATE).write_text(text, encoding="utf-8")
        commit_checkpoint(temporary, target, None if reference is None else reference.name)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what filled the disk
        if isinstance(error, SafetensorError):  # safetensors raises its own exception for a failed write
            raise OSError(str(error)) from error
        raise


def _free_name(target: Path) -> Path:
    """The temporary name of a checkpoint; another one if something that cannot be deleted has this name."""
    temporary = target.with_name(f"{target.name}.tmp")
    number = 1
    while os.path.lexists(temporary):
        number += 1
        temporary = target.with_name(f"{target.name}_{number}.tmp")
    return temporary


def clear(folder: Path) -> None:
    """Remove what a killed save left in checkpoints/. Only for the process that holds the run folder.

    What cannot be removed causes a warning.
    """
    for left_over in [*folder.glob("*.tmp"), *folder.glob(".*.replaced")]:
        name = left_over.stem.removeprefix(".")
        try:
            if left_over.suffix == ".tmp" and re.fullmatch(rf"{NAME}(_\d+)?", left_over.stem):
                discard(left_over)
            elif left_over.suffix == ".replaced" and re.fullmatch(NAME, name):
                restore_replaced(folder / name)
        except OSError as error:
            logger.warning("%s is left over from an earlier save and could not be removed: %s", left_over, error)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, without temporary folders and copies."""
    found = (p for p in folder.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d{6,}", p.name))
    return sorted(found, key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest. Logs a warning for each newer one that is damaged.

    Returns None if there is no checkpoint at all. Raises FileError if there are checkpoints but none is intact.
    """
    found = step_folders(folder)
    for checkpoint in reversed(found):
        problem = find_damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", checkpoint, problem)
    if found:
        raise FileError(f"none of the {len(found)} checkpoints in {folder} is intact; nothing was deleted")
    return None


def named_checkpoint(folder: Path, name: str, argument: str = "checkpoint") -> Path:
    """The intact checkpoint `best`, or that of a step. Raises ConfigError, with those that are kept.

    argument: the name of the argument that `name` was given with.
    """
    kept = [str(step_of(path)) for path in step_folders(folder)]
    kept += ["best"] if (folder / "best").is_dir() else []
    said = f"of: {', '.join(kept) or 'none'}"
    if name != "best" and not name.isdecimal():
        raise ConfigError(f"{argument}={name}: give best or a step; {folder.parent} keeps checkpoints {said}")
    checkpoint = folder / "best" if name == "best" else step_folder(folder, int(name))
    if not checkpoint.exists():
        which = "best accuracy" if name == "best" else "that step"
        raise ConfigError(f"{argument}={name}: {folder.parent} keeps no checkpoint of {which}, but {said}")
    problem = find_damage(checkpoint)
    if problem is not None:
        raise ConfigError(f"{argument}={name}: {checkpoint} is damaged ({problem}); kept are checkpoints {said}")
    return checkpoint


def find_damage(checkpoint: Path) -> str | None:
    """Describe what is wrong with the files of a checkpoint or of its reference; None if they are intact."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        needed = ["model.safetensors"]
        if checkpoint.name.startswith("step_"):
            needed += [OPTIMIZER, STATE]
        if missing := [name for name in needed if name not in manifest["files"]]:
            return f"{MANIFEST} does not name {missing[0]}"
        for name, expected in manifest["files"].items():
            if Path(name).name != name or not (checkpoint / name).is_file():
                return f"{name} is not a file in it"
            if (checkpoint / name).stat().st_size != expected["size"]:
                return f"{name} is not {expected['size']} bytes long"
            if file_digest(checkpoint / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    reference = manifest.get("reference")
    is_reference = checkpoint.name.startswith("reference_")  # which needs no other one
    if reference and (is_reference or not re.fullmatch(r"reference_\d{6,}", str(reference))):
        return f"{reference} is not a reference"
    problem = find_damage(checkpoint.parent / reference) if reference else None
    return f"its reference {reference}: {problem}" if problem else None


def load_state(checkpoint: Path) -> TrainerState:
    """Read the TrainerState of a checkpoint.

    Raises FileError if its file is damaged, of a newer version, or of another step than the folder's name says.
    """
    file = checkpoint / STATE
    state = read_dataclass(TrainerState, file, STATE_STEPS)
    counts = (state.step, state.iteration, state.num_tokens, state.evaluated_step, state.skipped_in_a_row)
    if min(counts) < 0 or (checkpoint.name.startswith("step_") and state.step != step_of(checkpoint)):
        raise FileError(f"{file} is not the state after the step of its folder: step {state.step}, counts {counts}")
    return state


def reference_of(checkpoint: Path) -> Path | None:
    """The folder of the reference that a checkpoint needs; None if no reference was saved for it."""
    name = read_json(checkpoint / MANIFEST, {"reference": str | None}).get("reference")
    return checkpoint.parent / name if name else None


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read on access.

    The file is opened for each access: it is mapped into memory, and its pages count as used until it is closed. If it
    is damaged, opening or reading it raises FileError.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with self._open() as stored:
            self._names = list(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as stored:
            return stored.get_tensor(name)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._file, "pt") as stored:
                yield stored
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self._file} is damaged: {first_line(error)}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __str__(self) -> str:
        return str(self._file)


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint for `Trainer.load_state_dict`. Raises FileError if trainer_state.json is damaged."""
    reference = reference_of(checkpoint)
    return {
        "model": StoredTensors(checkpoint / "model.safetensors"),
        "optimizer": StoredTensors(checkpoint / OPTIMIZER),
        "reference": None if reference is None else StoredTensors(reference / "model.safetensors"),
        "trainer": load_state(checkpoint),
    }


@torch.no_grad()
def load_weights(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copy weights into the trainable parameters of a model. Raises FileError if names, shapes or types differ.

    Another floating-point type is converted.
    """
    parameters = _trained(model)
    if missing := sorted(parameters.keys() - tensors.keys()):
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise FileError(f"{source_of(tensors)} does not fit the model: it lacks {missing[0]}{more}")
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape or not value.is_floating_point():
            kind = f"of shape {tuple(value.shape)} and type {value.dtype}"
            raise FileError(f"{source_of(tensors)} does not fit the model, which has no {name} {kind}")
        parameters[name].copy_(value)


def source_of(tensors: Mapping[str, Tensor]) -> str:
    """The source of tensors, for an error message."""
    return str(tensors) if isinstance(tensors, StoredTensors) else "what was given"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a model by name; tied weights appear once, under their first name."""
    return {name: parameter.detach().contiguous() for name, parameter in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it takes {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free in {folder}")


def commit_checkpoint(temporary: Path, target: Path, reference: str | None) -> None:
    """Write the manifest, sync every file, and rename the folder to `target`."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": file_digest(file)} for file in sorted(temporary.iterdir())
    }
    write_atomic(temporary / MANIFEST, json.dumps({"files": files, "reference": reference}, indent=2))
    commit_folder(temporary, target)


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
