"""Checkpoints: complete or absent, checked by checksum, read without executing code.

A checkpoint is a folder step_000050/ with model.safetensors, optimizer.safetensors, trainer_state.json, the reference
where it is no longer the starting model, and manifest.json, which is written last.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grpo.run.folder import write_whole

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass
class TrainerState:
    """Where a run stands after a step. No random state: the noise of a step follows from its number."""

    step: int = 0  # completed steps over all iterations
    iteration: int = 0  # outer iteration of that step, from 1
    num_tokens: int = 0  # prompt and completion tokens seen so far
    best_reward: float | None = None  # highest mean reward of a step
    best_accuracy: float | None = None  # highest held-out accuracy
    weights_digest: str = ""


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None, state: TrainerState
) -> Path:
    """Write `folder/step_<n>/`, complete or not at all: a temporary folder, everything synced, then one rename.

    reference: given where it is no longer the starting model.
    """
    target = folder / f"step_{state.step:06d}"
    temporary = _fresh_temporary(folder, target.name)
    weights = weights_of(model)
    state.weights_digest = digest(weights)
    save_file(weights, temporary / "model.safetensors")
    save_file(flatten_optimizer(optimizer), temporary / "optimizer.safetensors")
    if reference is not None:
        save_file(weights_of(reference), temporary / "reference.safetensors")
    (temporary / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2))
    _commit(temporary, target)
    return target


def save_best(folder: Path, model: nn.Module, state: TrainerState) -> None:
    """Replace `folder/best/` by the present weights."""
    temporary = _fresh_temporary(folder, "best")
    save_file(weights_of(model), temporary / "model.safetensors")
    (temporary / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2))
    _commit(temporary, folder / "best")


def keep_last(newest: Path, count: int) -> None:
    """Delete checkpoints older than the last `count`, of which `newest`, just written, is the last.

    What bears a later step is damaged, since the run would have gone on from there: it does not count as one to
    keep. best/ stays. A failed delete is a warning, not an error.
    """
    for old in [path for path in step_folders(newest.parent) if path.name <= newest.name][:-count]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("could not delete the old checkpoint %s: %s", old, error)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished temporary folders are not among them."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and not p.name.endswith(".tmp"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says, with a loud warning for each that is not.

    None where there is no checkpoint at all. Raises RuntimeError where there are some and none is intact.
    """
    found = step_folders(folder)
    for checkpoint in reversed(found):
        problem = broken(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", checkpoint, problem)
    if found:
        raise RuntimeError(f"none of the {len(found)} checkpoints in {folder} is intact; nothing was deleted")
    return None


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            if (checkpoint / name).stat().st_size != expected["size"]:
                return f"{name} is not {expected['size']} bytes long"
            if _file_digest(checkpoint / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error) or type(error).__name__
    return None


def load_state(checkpoint: Path) -> TrainerState:
    return TrainerState(**json.loads((checkpoint / "trainer_state.json").read_text()))


def load_weights(checkpoint: Path, model: nn.Module, name: str = "model") -> None:
    """Put a checkpoint's weights into a model of the same shapes."""
    missing, unexpected = model.load_state_dict(load_file(checkpoint / f"{name}.safetensors"), strict=False)
    tied = {key for key, _ in model.named_parameters(remove_duplicate=False)} - {
        key for key, _ in model.named_parameters()
    }
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"{checkpoint} does not fit the model: missing {missing}, unexpected {unexpected}")


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by `<parameter number>.<name>`. Its settings come from the config, not from here."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value.contiguous() for number, entry in state.items() for key, value in entry.items()}


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer the state that a checkpoint holds; parameters must be in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, each once: tied ones appear under their first name."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of tensors, independent of their order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.view(torch.uint8).numpy() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _fresh_temporary(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.tmp"):
        shutil.rmtree(left_over)
    temporary = folder / f"{name}.tmp"
    temporary.mkdir()
    return temporary


def _commit(temporary: Path, target: Path) -> None:
    """Write the manifest, sync every file, and move the folder to its name."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _file_digest(file)} for file in sorted(temporary.iterdir())
    }
    write_whole(temporary / MANIFEST, json.dumps({"files": files}, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
