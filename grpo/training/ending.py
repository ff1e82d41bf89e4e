"""How a launch ends: with all steps made, or at a step where it was asked to stop."""

import logging
from typing import TYPE_CHECKING

from rich.console import Console

from grpo.config.instantiate import foreign_targets
from grpo.config.schema import first_line, to_dict
from grpo.launch.session import Run
from grpo.runs.console import closing_table, next_commands, resume_command
from grpo.runs.tracking import Tracker

if TYPE_CHECKING:
    from grpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def pause(trainer: "Trainer", run: Run, tracker: Tracker) -> None:
    """Evaluate where the run stands, and leave it to go on later as the run that it would have been."""
    name = f"step_{trainer.state.step:06d}"
    if trainer.config.eval.after and run.folder.evaluation(name) is None:
        trainer.evaluate(run, tracker, name)
    run.folder.update_status(state="interrupted")
    resume = resume_command(run.folder.path, foreign_targets(to_dict(trainer.config)))
    print(f"stopped after step {trainer.state.step}, as asked; go on with: {resume}")


def finish(trainer: "Trainer", run: Run, tracker: Tracker, console: Console) -> None:
    """Evaluate, save the model, draw the charts, and say what to do next."""
    from grpo.analysis.run_report import write_run_report  # here, since matplotlib takes a second to import

    after = run.folder.evaluation("after")
    if trainer.config.eval.after and (after is None or after["step"] != trainer.state.step):
        trainer.evaluate(run, tracker, "after")
    run.folder.save_final_model(trainer.setup.save_policy(trainer.policy), trainer.setup.tokenizer.save_pretrained)
    run.folder.update_status(state="finished")
    run.stop.ignored_from_here()
    try:
        write_run_report(run.folder.path)
    except Exception as error:  # the run has finished, and this can be made again
        command = f"python -m grpo report run_dir={run.folder.path}"
        logger.warning("no report (%s: %s); try again: %s", type(error).__name__, first_line(error), command)
    evaluations = {name: run.folder.evaluation(name) for name in ("before", "after")}
    if any(evaluations.values()):
        console.print(closing_table(evaluations))
    tracker.set_summary({f"{k}_accuracy": v["accuracy"] for k, v in evaluations.items() if v})
    grpo = trainer.config.grpo
    extensible = grpo.lr_schedule == "constant" and grpo.num_iterations == 1
    foreign = foreign_targets(to_dict(trainer.config))
    print(next_commands(run.folder.path, foreign, f"grpo.num_steps={2 * grpo.num_steps}" if extensible else None))
