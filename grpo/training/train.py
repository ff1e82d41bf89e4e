"""The training loop: GRPO as Algorithm 1 of DeepSeekMath (arXiv 2402.03300) has it, from a run folder to its end."""

import logging
import shlex
from contextlib import closing
from datetime import datetime

from rich.console import Console

from grpo.config.errors import ConfigError, first_line
from grpo.config.trust import foreign_targets
from grpo.config.values import to_dict
from grpo.runs.console import StepDisplay, closing_table, next_commands, resume_command
from grpo.runs.environment import environment
from grpo.runs.run import Run
from grpo.runs.saver import Saver
from grpo.runs.tracking import Tracker, tracking
from grpo.training.experiment import prepare
from grpo.training.metrics import evaluation_metrics
from grpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Train from wherever the run folder stands to its end. SystemExit after a stop signal, with all saved."""
    setup = prepare(run.config, on_hang=run.end_process)
    trainer = Trainer(setup)
    rows = trainer.restore(run)
    check_until(run.until_step, trainer.state.step)
    if run.config.grpo.mu == 1:
        logger.info("mu=1: the ratio is 1 at every update, so the loss says little; its gradient is what counts")
    run.folder.record_changes(run.changes)  # only now that they are known to work
    run.folder.record_launch(
        {
            "time": datetime.now().isoformat(timespec="seconds"),
            "from_step": trainer.state.step,
            "overrides": run.overrides,
            "changes": run.changes,
            "environment": environment(setup.device),
        },
        begun=run.forked or not run.resumed,
    )
    console = Console()
    print(f"{'resuming' if run.resumed else 'run folder'} {run.folder.path}")
    made = run.folder.training_evaluations(trainer.state.step)
    evaluations = {name: evaluation_metrics(result) | {"step": result["step"]} for name, result in made.items()}
    config, path = to_dict(run.config), run.folder.path
    with tracking(config, path, resumed=run.resumed, rows=rows, evaluations=evaluations) as tracker:
        print("".join(f"{line}\n" for line in tracker.how_to_look), end="", flush=True)
        at = trainer.state.step
        run.folder.update_status(total_steps=trainer.total_steps, step=at, saved_step=at)
        trainer.preflight_if_due(run)
        if run.config.eval.before and trainer.state.step == 0 and run.folder.evaluation("before") is None:
            before = trainer.evaluate(run, tracker, "before")
            if before["accuracy"] is not None:
                console.print(f"before training: {before['accuracy']:.1%} of {before['n']} held-out problems right")
        display = StepDisplay(console, trainer.total_steps, trainer.state.step + 1)
        saver = Saver(run.folder.checkpoints, run.config.checkpoint, trainer.state)
        stop_with_care = run.stop.deferred(trainer.can_be_dropped, save=lambda: trainer.save_and_wait(run, saver))
        with display.shown(), stop_with_care, closing(saver):
            trainer.evaluate_if_due(run, tracker, saver)  # where a stop interrupted it
            until = min(trainer.total_steps, run.until_step or trainer.total_steps)
            for step in range(trainer.state.step + 1, until + 1):
                done = trainer.step(step)
                trainer.record(run, tracker, saver, done)
                for finding in trainer.doctor.look(done.row):
                    console.print(f"doctor: {finding.text}", style="yellow", soft_wrap=True)
                    tracker.alert(finding.rule, f"step {finding.step}: {finding.text}")
                display.update(done.row)
                run.stop.leave_if_asked()
            if until < trainer.total_steps:
                trainer.save(run, saver)
            saver.close()
            run.stop.leave_if_asked()
        if until < trainer.total_steps:
            pause(trainer, run, tracker)
        else:
            finish(trainer, run, tracker, console)


def check_until(until_step: int | None, step: int) -> None:
    """Raise ConfigError for an until_step that a run has passed; at it, an evaluation may still be missing."""
    if until_step is not None and until_step < step:
        raise ConfigError(f"until_step={until_step}: the run is at step {step} already; give a later one, or none")


def pause(trainer: Trainer, run: Run, tracker: Tracker) -> None:
    """Evaluate where the run stands, and leave it to be resumed as the run that it would have been."""
    name = f"step_{trainer.state.step:06d}"
    if trainer.config.eval.after and run.folder.evaluation(name) is None:
        trainer.evaluate(run, tracker, name)
    run.folder.update_status(state="interrupted")
    resume = resume_command(run.folder.path, foreign_targets(to_dict(trainer.config)))
    print(f"stopped after step {trainer.state.step}, as asked; resume with: {resume}")


def finish(trainer: Trainer, run: Run, tracker: Tracker, console: Console) -> None:
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
    except Exception as error:  # the run has finished, and this can be written again
        command = f"python -m grpo report {shlex.quote(f'run_dir={run.folder.path}')}"
        logger.warning("no report (%s: %s); try again: %s", type(error).__name__, first_line(error), command)
    evaluations = {name: run.folder.evaluation(name) for name in ("before", "after")}
    if any(evaluations.values()):
        console.print(closing_table(evaluations))
    tracker.set_summary({f"{k}_accuracy": v["accuracy"] for k, v in evaluations.items() if v})
    grpo = trainer.config.grpo
    extensible = grpo.lr_schedule == "constant" and grpo.num_iterations == 1
    foreign = foreign_targets(to_dict(trainer.config))
    print(next_commands(run.folder.path, foreign, f"grpo.num_steps={2 * grpo.num_steps}" if extensible else None))
