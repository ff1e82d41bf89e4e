"""The step and the time at which a run reaches the accuracy that it is to reach, `target.accuracy`."""

from typing import Any

from grpo.runs.folder import RunFolder


def time_to_target(run: RunFolder, accuracy: float, up_to_step: int | None = None) -> dict[str, Any] | None:
    """When a run first reached an accuracy on the problems by which it is chosen; None if it did not.

    Returns `step`, the first evaluated step with at least this accuracy, not counting the model before training, with
    `seconds`, the time of all steps up to it without evaluations and checkpoints, and `accuracy`, that of the
    evaluation. up_to_step: leave out later evaluations. It depends only on files of the run, so a resumed run has
    reached it at the same step.
    """
    evaluations = [each for each in run.choosing_evaluations() if each["step"] and each["accuracy"] is not None]
    for evaluation in sorted(evaluations, key=lambda each: each["step"]):
        step = evaluation["step"]
        if up_to_step is not None and step > up_to_step:
            return None
        if evaluation["accuracy"] >= accuracy:
            seconds = sum(row.get("step_time") or 0.0 for row in run.metrics(step))
            return {"step": step, "seconds": seconds, "accuracy": evaluation["accuracy"]}
    return None


def target_text(target: float, reached: dict[str, Any] | None) -> str:
    """When the target was reached, as a sentence without a full stop."""
    if reached is None:
        return f"target of {target:.1%} not reached"
    seconds = reached["seconds"]
    time = f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} s"
    return f"target of {target:.1%} reached after step {reached['step']}, {time} of training"
