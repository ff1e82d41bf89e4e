"""The output of a run: metrics, samples, evaluations and checkpoints, for its folder, the tracker and the console."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from grpo.analysis.doctor import Doctor, Finding, dtype_of
from grpo.analysis.target import target_text, time_to_target
from grpo.config.values import to_dict
from grpo.metric_table import component_ranges
from grpo.runs.checkpoint import TrainerState
from grpo.runs.checkpoint_writer import CheckpointWriter
from grpo.runs.console import StepDisplay, evaluation_table
from grpo.runs.files import disk_errors_are_warnings, short_path
from grpo.runs.run import Run
from grpo.runs.tracking import Tracker, tracking
from grpo.training.metrics import evaluation_metrics
from grpo.training.preflight import lines
from grpo.training.trainer import Step

logger = logging.getLogger(__name__)


class Recorder:
    """Records the trainer's results for the training loop."""

    def __init__(self, run: Run, tracker: Tracker, doctor: Doctor, state: TrainerState, total_steps: int) -> None:
        """state: the state that the run starts or continues from, which is on the disk already."""
        self._tracker = tracker
        self._console = Console()
        self._saver = CheckpointWriter(run.folder.checkpoints, run.config.checkpoint, state)
        self._run = run
        self._folder = run.folder
        self._config = run.config
        self._total_steps = total_steps
        self._display = StepDisplay(self._console, total_steps, state.step + 1)
        self._doctor = doctor
        self._recorded_step = state.step  # `saved_step` in status.json
        self._last_row = state.step  # step of the last row of metrics.jsonl
        self._saving_s = 0.0  # seconds for which the last save blocked training, reported with the next step

    def show_links(self) -> None:
        """Print where the run can be watched."""
        print("".join(f"{line}\n" for line in self._tracker.how_to_look), end="", flush=True)

    def preflight(self, found: Mapping[str, Any]) -> None:
        """Write and show what was found before the first step."""
        self._folder.write_preflight(dict(found))
        for text in found["warnings"]:
            logger.info("pre-flight: %s", text)
        print("\n".join(lines(found)), flush=True)

    def step(self, step: Step) -> None:
        """Write a completed step. Raises RuntimeError if too many steps in a row were not finite."""
        row = step.row | {"timing_s/checkpoint": self._saving_s}
        self._saving_s = 0.0
        number = row["step"]
        self._folder.append_metrics(row)
        self._last_row = number
        self._tracker.log(row)
        if is_sampled(number, self._config.samples.every, self._total_steps):
            with disk_errors_are_warnings(f"the samples of step {number}"):
                self._folder.write_samples(number, step.samples)
        if is_due(number, self._config.tracking.completions_every):
            self._tracker.log_completions(number, step.samples)
        if step.skipped is not None:
            self._skipped(step)
        self._update_status(
            step=number,
            iteration=row["iteration"],
            total_steps=self._total_steps,
            best_reward=step.best_reward,
            seconds=self._run.seconds,
            saved_step=self._saver.saved_step,
        )

    def _update_status(self, saved_step: int, **changes: Any) -> None:
        with disk_errors_are_warnings(f"{self._run.shown_path}/status.json"):
            self._folder.update_status(saved_step=saved_step, **changes)
            self._recorded_step = saved_step

    def _skipped(self, step: Step) -> None:
        """Write the batch of a step that was not finite. Raises RuntimeError if there are too many in a row."""
        assert step.skipped is not None
        in_a_row = step.skipped_in_a_row
        number = step.row["step"]
        place = short_path(self._folder.skipped_file(number))
        with disk_errors_are_warnings(f"the batch of step {number}"):
            self._folder.write_skipped(number, step.skipped.tensors(), step.samples)
        numbers = f"loss {step.row['loss']} and gradient norm {step.row['grad_norm']} (null: not finite)"
        logger.warning("step %d: %s, so no weight was changed; its batch is in %s", number, numbers, place)
        if in_a_row > self._config.grpo.max_skipped_steps:
            raise RuntimeError(
                f"loss or gradient was not finite in {in_a_row} steps in a row; their batches are in {place.parent}; "
                "usually optimizer.lr is too high or model.dtype too narrow"
            )

    def evaluation(self, name: str, result: Mapping[str, Any]) -> None:
        """Write an evaluation as eval/<name>.json, and show its accuracy."""
        self._folder.write_evaluation(name, dict(result))
        self._tracker.log_evaluation(name, result["step"], evaluation_metrics(result))
        if result["accuracy"] is not None and name != "after":  # the closing table has that one
            when = f"after step {result['step']}" if result["step"] > 0 else "before training"
            correct = f"{result['accuracy']:.1%} of {result['n']}"
            self._console.print(f"{when}: {correct} {result['split']} problems correct", highlight=False)
        if result["missing"]:
            problems = f"{result['missing']} of {result['n'] + result['missing']} {result['split']} problems"
            self._console.print(f"eval.accuracy gave no value for {problems}; they do not count", style="yellow")
        self._show_findings(self._doctor.add_evaluation(result))

    def has_row_of(self, step: int) -> bool:
        """Whether metrics.jsonl has the rows up to this step, without which a run cannot continue from it."""
        return self._last_row == step

    def save(self, saved: Mapping[str, Any]) -> None:
        """Write a checkpoint of the last completed step, unless one exists; saved: the `Trainer.state_dict`."""
        started = time.perf_counter()
        self._folder.sync_metrics()  # a checkpoint needs the rows of all its steps
        self._saver.save(saved)
        self._record_saved_step()  # if it is written during training, the next step records it
        self._saving_s += time.perf_counter() - started

    def save_and_wait(self, saved: Mapping[str, Any]) -> None:
        """Like `save`, but return only when the checkpoint is written."""
        self.save(saved)
        self.wait_for_saves()

    def wait_for_saves(self) -> None:
        """Wait until no checkpoint is being written."""
        self._saver.close()
        self._record_saved_step()

    def _record_saved_step(self) -> None:
        if self._saver.saved_step != self._recorded_step:
            self._update_status(saved_step=self._saver.saved_step)

    def check_saves(self) -> None:
        """Raise RuntimeError if too many checkpoints in a row could not be written."""
        self._saver.check()

    def save_best(self, saved: Mapping[str, Any]) -> None:
        """Keep these weights as the best so far, if the config says so. Training waits until they are written."""
        started = time.perf_counter()
        self._saver.save_best(saved)
        self._saving_s += time.perf_counter() - started

    @contextmanager
    def progress_display(self) -> Iterator[None]:
        """Show progress on the console within the block; at its end, wait until no checkpoint is being written."""
        with self._display.displayed():
            try:
                yield
            finally:
                self.wait_for_saves()

    def show(self, step: Step) -> None:
        """Show a completed step and the doctor's findings."""
        self._show_findings(self._doctor.check(step.row))
        self._display.update(step.row)

    def _show_findings(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._console.print(f"doctor: {finding.text}", style="yellow", markup=False, soft_wrap=True)
            self._tracker.alert(finding.rule, f"step {finding.step}: {finding.text}")

    def finish(self) -> None:
        """Show the evaluations before and after training, and add them to the tracker's summary."""
        from grpo.analysis.summary import accuracy_difference, difference_text  # here, since pandas takes a second

        evaluations = {name: self._folder.evaluation(name) for name in ("before", "after")}
        if any(evaluations.values()):
            self._console.print(evaluation_table("test problems", evaluations))
        difference = accuracy_difference(**evaluations)
        if difference is not None:
            self._console.print(f"accuracy {difference_text(difference)}", highlight=False, soft_wrap=True)
        self._show_best()
        self._show_target()
        self._tracker.set_summary({f"{k}_accuracy": v["accuracy"] for k, v in evaluations.items() if v})

    def _show_target(self) -> None:
        """Show when the run reached its target, if it has one."""
        target = self._config.target.accuracy
        if target is None:
            return
        reached = time_to_target(self._folder, to_dict(self._config))
        self._console.print(target_text(target, reached), highlight=False)
        self._tracker.set_summary({f"target/{name}": value for name, value in (reached or {}).items()})

    def _show_best(self) -> None:
        """Show the best evaluation during training, if it is better than the one after training."""
        graded = [each for each in self._folder.choosing_evaluations() if each["accuracy"] is not None]
        best = max(graded, key=lambda each: each["accuracy"], default=None)  # the first of equal ones
        if best is not None and best["accuracy"] > graded[-1]["accuracy"]:
            when = f"after step {best['step']}" if best["step"] > 0 else "before training"
            kept = best["step"] > 0 and (self._folder.checkpoints / "best").is_dir()
            where = "; its weights are in checkpoints/best" if kept else ""
            self._console.print(f"best {best['split']} accuracy: {best['accuracy']:.1%} {when}{where}", highlight=False)


@contextmanager
def recording(run: Run, state: TrainerState, total_steps: int) -> Iterator[Recorder]:
    """A recorder with a tracker, which is closed at the end of the block."""
    rows = run.folder.metrics(state.step)
    results = run.folder.training_evaluations(state.step)
    values = to_dict(run.config)
    doctor = Doctor(component_ranges(values), dtype_of(values))
    doctor.replay(rows, results.values())  # an earlier launch has shown its findings on these steps
    logged = {name: evaluation_metrics(result) | {"step": result["step"]} for name, result in results.items()}
    with tracking(values, run.folder.path, resumed=run.resumed, rows=rows, evaluations=logged) as tracker:
        yield Recorder(run, tracker, doctor, state, total_steps)


def is_due(step: int, every: int) -> bool:
    """Whether an action that is done every `every` steps (0: never) is due after this step."""
    return every > 0 and step % every == 0


def is_sampled(step: int, every: int, total_steps: int) -> bool:
    """Whether the completions of a step are written to samples/: every `every` steps, and of the first and last one."""
    return is_due(step, every) or (every > 0 and step in (1, total_steps))
