"""The step and the time at which a run reaches the accuracy that it is to reach, `target.accuracy`."""

from collections.abc import Mapping
from typing import Any

from grpo.runs.folder import RunFolder


def time_to_target(run: RunFolder, config: Mapping[str, Any], up_to_step: int | None = None) -> dict[str, Any] | None:
    """When a run first reached target.accuracy on the problems by which it is chosen; None if it did not.

    config: the run's config as plain dicts. Returns `step`, the first step with an evaluation of eval.every and at
    least this accuracy, with `seconds`, the time of all steps up to it without evaluations and checkpoints, and
    `accuracy`, that of the evaluation. Other evaluations, such as that of a pause, do not count, so that a resumed run
    has reached it at the same step; nor do those that a fork has from its parent. up_to_step: leave out later ones.
    """
    every = config["eval"]["every"]
    if not every:
        return None
    first = (config.get("parent") or {}).get("step", 0)
    evaluations = {each["step"]: each["accuracy"] for each in run.choosing_evaluations()}
    for step, accuracy in sorted(evaluations.items()):
        counts = step > first and step % every == 0 and (up_to_step is None or step <= up_to_step)
        if counts and accuracy is not None and accuracy >= config["target"]["accuracy"]:
            seconds = sum(row.get("step_time") or 0.0 for row in run.metrics(step) if row["step"] > first)
            return {"step": step, "seconds": seconds, "accuracy": accuracy}
    return None


def target_text(target: float, reached: dict[str, Any] | None) -> str:
    """When the target was reached, as a sentence without a full stop."""
    if reached is None:
        return f"target of {target:.1%} not reached"
    seconds = reached["seconds"]
    time = f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} s"
    return f"target of {target:.1%} reached after step {reached['step']}, {time} of training"
