"""Save a run's checkpoints, in the foreground or in a background thread, and delete those not to be kept."""

import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from grpo.config.schema import CheckpointConfig
from grpo.runs.checkpoint import (
    NAME,
    TrainerState,
    clear,
    reference_folder,
    reference_of,
    step_folder,
    step_folders,
    write_checkpoint,
)
from grpo.runs.files import step_of

logger = logging.getLogger(__name__)
TRIES = 5  # consecutive failed checkpoints after which the run ends


class CheckpointWriter:
    """Writes the checkpoints of one run. A failed write only causes a warning; the checkpoint before it is kept.

    After several failed writes in a row, `check` raises an error.
    """

    def __init__(self, folder: Path, settings: CheckpointConfig, state: TrainerState) -> None:
        """state: the state from which the run starts or continues, which is already on disk."""
        self._folder = folder
        self._settings = settings
        clear(folder)
        self._idle = threading.Event()
        self._idle.set()
        self.saved_step = state.step  # step of the newest checkpoint on disk
        self._failures = 0  # consecutive failed writes of a step
        self._problem = ""  # the last of them
        has_reference = reference_folder(folder, state.iteration).exists()
        self._reference_iteration = state.iteration if has_reference else 0  # its reference is on disk; 0: none

    def save(self, saved: Mapping[str, Any]) -> None:
        """Save a checkpoint, unless its step is saved already, and delete the checkpoints that are not to be kept.

        saved: as returned by `Trainer.state_dict`. With `overlap`, its tensors are first copied to host memory, and
        then written while training continues.
        """
        self.close()
        state = saved["trainer"]
        if state.step == self.saved_step:
            return
        tensors = {name: saved[name] for name in ("model", "optimizer")}
        has_reference = saved["reference"] is not None
        moved = saved["reference"] if has_reference and self._reference_iteration != state.iteration else {}
        if self._settings.overlap:
            tensors = {name: _copied(group) for name, group in tensors.items()}
            moved = _copied(moved)

        def write() -> None:
            target = step_folder(self._folder, state.step)
            try:
                place = self._write_reference(moved, state) if has_reference else None
                write_checkpoint(target, tensors, state, place)
            except Exception as error:
                self._failures += 1
                self._problem = str(error)
                raise
            self.saved_step = state.step
            self._failures = 0
            retain(target, self._settings)

        self._run(write, f"the checkpoint of step {state.step}")

    def save_best(self, saved: Mapping[str, Any]) -> None:
        """Replace `best/` by these weights, if `keep_best` is set."""
        self.close()
        reference = saved.get("reference")

        def write() -> None:
            place = None if reference is None else self._write_reference(reference, saved["trainer"])
            write_checkpoint(self._folder / "best", {"model": saved["model"]}, saved["trainer"], place)

        if self._settings.keep_best:
            self._write(write, "best/")

    def _write_reference(self, tensors: dict[str, Tensor], state: TrainerState) -> Path:
        """The folder of the reference of the state's iteration, written if it is not on disk yet."""
        place = reference_folder(self._folder, state.iteration)
        if self._reference_iteration != state.iteration:
            write_checkpoint(place, {"model": tensors})
            self._reference_iteration = state.iteration
        return place

    def check(self) -> None:
        """Raise RuntimeError after TRIES failed checkpoints, since a stopped run would lose more and more steps."""
        if self._failures >= TRIES:
            raise RuntimeError(
                f"the last {TRIES} checkpoints could not be written to {self._folder} ({self._problem}); "
                "make room there, or make it writable, and resume"
            )

    def close(self) -> None:
        """Wait until nothing is being written, even if a signal arrives meanwhile."""
        try:
            self._idle.wait()
        except BaseException:
            self._idle.wait()
            raise

    def _run(self, write: Callable[[], None], what: str) -> None:
        if not self._settings.overlap:
            self._write(write, what)
            return

        def in_background() -> None:
            try:
                self._write(write, what)
            finally:
                self._idle.set()

        self._idle.clear()
        threading.Thread(target=in_background, name="checkpoint").start()

    def _write(self, write: Callable[[], None], what: str) -> None:
        started = time.perf_counter()
        try:
            write()
        except Exception as error:  # usually of the disk; any other is in launch.log with its traceback
            logger.warning("could not write %s (%s); training continues, the one before it is kept", what, error)
            logger.info("could not write %s", what, exc_info=error)
            return
        logger.info("%s was written in %.3g s", what, time.perf_counter() - started)


def retain(newest: Path, settings: CheckpointConfig) -> None:
    """Delete all checkpoints except the last `keep_last` and those at multiples of `keep_every` steps.

    newest: the checkpoint just written. Checkpoints of later steps are not counted: they must be damaged, since
    otherwise the run would have continued from them. A reference is deleted with the last checkpoint that needs it;
    best/ is kept. A failed deletion only causes a warning.
    """
    folder = newest.parent
    older = [path for path in step_folders(folder) if step_of(path) <= step_of(newest)][: -settings.keep_last]
    for path in older:
        if not (settings.keep_every and step_of(path) % settings.keep_every == 0):
            _delete(path)
    needed = {_reference_name(path) for path in (*step_folders(folder), folder / "best")}
    for path in folder.glob("reference_*"):
        if re.fullmatch(NAME, path.name) and path.name not in needed:
            _delete(path)


def _reference_name(checkpoint: Path) -> str | None:
    try:
        reference = reference_of(checkpoint)
    except (OSError, ValueError):  # damaged: no run continues from it
        return None
    return None if reference is None else reference.name


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not delete the old checkpoint %s: %s", path, error)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
