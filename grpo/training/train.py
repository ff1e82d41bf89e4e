"""The training loop of a run."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

from grpo.analysis.target import time_to_target
from grpo.config.command_line import grpo_command, path_argument
from grpo.config.errors import ConfigError, first_line
from grpo.config.trust import foreign_targets
from grpo.config.values import to_dict
from grpo.data.splits import check_splits
from grpo.runs.checkpoint import latest_checkpoint, read_checkpoint
from grpo.runs.console import next_commands, resume_command
from grpo.runs.environment import environment
from grpo.runs.run import Run
from grpo.training.digests import check_digests, digests_of
from grpo.training.experiment import build_experiment
from grpo.training.recorder import Recorder, is_due, recording
from grpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Train from the run's last checkpoint to the end. Raises Exit after a stop signal, with everything saved."""
    with started(run) as trainer, recording(run, trainer.state, trainer.total_steps) as recorder:
        before_first_step(trainer, run, recorder)
        until = min(trainer.total_steps, run.until_step or trainer.total_steps)
        stops = run.stop.deferred(trainer.should_abort_step)
        with recorder.progress_display(), saved_at_early_end(trainer, run, recorder), stops:
            evaluate_if_due(trainer, recorder)  # an earlier stop signal may have interrupted it
            steps = () if ends_at_target(trainer, run) else trainer.steps(until)
            for step in steps:
                recorder.step(step)
                evaluate_if_due(trainer, recorder)
                save_if_due(trainer, recorder)
                recorder.show(step)
                run.stop.exit_if_requested()
                if is_due(trainer.state.step, run.config.eval.every) and ends_at_target(trainer, run):
                    break
            if trainer.state.step < trainer.total_steps:
                recorder.save(trainer.state_dict())
            recorder.wait_for_saves()
            run.stop.exit_if_requested()
        if trainer.state.step == trainer.total_steps or ends_at_target(trainer, run):
            finish(trainer, run, recorder)
        else:
            pause(trainer, run, recorder)


@contextmanager
def started(run: Run) -> Iterator[Trainer]:
    """The trainer of a run, with its latest checkpoint; its rollout engine is closed at the end of the block."""
    experiment = build_experiment(run.config, on_hang=run.end_process, status_file=run.folder.path / "status.json")
    check_splits(experiment.problems, run.config)
    trainer = Trainer(experiment)
    with closing(trainer.engine):
        found = digests_of(trainer.experiment, run.folder, trainer.master)
        accepted = check_digests(run.folder, found, (), run.config.accept_changes)
        restore(trainer, run)
        run.folder.update_digests(found, accepted)
        record_launch(trainer, run, accepted)
        if run.config.grpo.mu == 1:
            logger.info("mu=1: the ratio is 1 at every update, so the loss says little; its gradient is what counts")
        yield trainer


def restore(trainer: Trainer, run: Run) -> None:
    """Continue from the newest intact checkpoint, if there is one, and drop the metrics rows of later steps.

    Raises ConfigError or RuntimeError if the run was trained but has no checkpoints, or has passed `until_step`.
    """
    latest = latest_checkpoint(run.folder.checkpoints) if run.resumed else None
    if latest is not None:
        trainer.load_state_dict(read_checkpoint(latest))
    elif run.config.parent is not None and run.resumed:
        raise RuntimeError(
            f"{run.folder.checkpoints} is empty, so the checkpoint that the fork began from is lost; fork again"
        )
    elif run.resumed and (saved := run.folder.saved_step()) > 0:
        raise ConfigError(
            f"{run.folder.checkpoints} has no checkpoint, but the run has saved one at step {saved}; restore its "
            "checkpoints, or start a new run"
        )
    step = trainer.state.step
    if run.resumed:
        logger.info("resuming after step %d", step)
    check_until(run.until_step, step)
    run.folder.truncate_metrics(step)


def check_until(until_step: int | None, step: int) -> None:
    """Raise ConfigError if a run has passed `until_step`. A run at this step may still lack an evaluation."""
    if until_step is not None and until_step < step:
        raise ConfigError(f"until_step={until_step}: the run is at step {step} already; set a later one, or remove it")


def record_launch(trainer: Trainer, run: Run, accepted: list[str]) -> None:
    """Record the start of this launch. Called when its config and checkpoint have been loaded without errors.

    accepted: the names of the digests that differ from the run's, accepted by accept_changes=true.
    """
    run.recorded = True
    trainer.experiment.all_lengths.save()
    run.folder.record_changes(run.changes)
    run.folder.record_launch(
        {
            "time": datetime.now().isoformat(timespec="seconds"),
            "from_step": trainer.state.step,
            "overrides": run.overrides,
            **({"flags": run.flags} if run.flags else {}),
            "changes": run.changes,
            **({"accepted": accepted} if accepted else {}),
            "environment": environment(trainer.experiment.device),
        },
        begun=run.forked or not run.resumed,
    )
    path = run.shown_path
    parent = run.config.parent
    if run.forked and parent is not None:
        anew = ", with a new optimizer state" if parent.get("fresh_optimizer") else ""
        print(f"forked from {parent['run_dir']} at step {parent['step']} into {path}{anew}")
    else:
        print(f"{'resuming' if run.resumed else 'run folder'} {path}")


def before_first_step(trainer: Trainer, run: Run, recorder: Recorder) -> None:
    """Run the pre-flight and the evaluation before training, unless they are done already."""
    recorder.show_links()
    step = trainer.state.step
    run.folder.update_status(total_steps=trainer.total_steps, step=step, saved_step=step)
    if step > 0:
        return
    if run.config.preflight and not run.folder.preflight_file.exists():
        recorder.preflight(trainer.preflight())
    splits = {"before": "test"}
    if run.config.eval.every and trainer.experiment.problems.validation:
        splits["step_000000"] = "validation"
    missing = {name: split for name, split in splits.items() if run.folder.evaluation(name) is None}
    if run.config.eval.before and missing:
        store = trainer.completion_store()
        for name, split in missing.items():
            recorder.evaluation(name, trainer.evaluate(split, store))


def evaluate_if_due(trainer: Trainer, recorder: Recorder) -> None:
    """Evaluate by the validation problems if `eval.every` requires it, and save the weights if they are the best."""
    state = trainer.state
    if state.evaluated_step == state.step or not is_due(state.step, trainer.config.eval.every):
        return
    result = trainer.evaluate(trainer.experiment.problems.split_to_choose_by)
    recorder.evaluation(f"step_{state.step:06d}", result)
    state.evaluated_step = state.step
    accuracy = result["accuracy"]
    best = state.best_accuracy
    if accuracy is not None and (best is None or accuracy > best):
        state.best_accuracy = accuracy
        recorder.save_best(trainer.state_dict())


@contextmanager
def saved_at_early_end(trainer: Trainer, run: Run, recorder: Recorder) -> Iterator[None]:
    """Save the last completed step if a signal or an error ends the block.

    Not after an error within an update, which may have changed some of the weights, nor after a second signal.
    """
    try:
        yield
    except BaseException:
        if trainer.can_be_saved() and recorder.has_row_of(trainer.state.step) and not run.stop.again:
            try:
                recorder.save_and_wait(trainer.state_dict())
            except Exception as error:  # must not hide why the run ended
                logger.warning("the steps since the last checkpoint could not be saved: %s", first_line(error))
        raise


def ends_at_target(trainer: Trainer, run: Run) -> bool:
    """Whether target.stop ends the run here: target.accuracy is reached by the current step."""
    target = run.config.target
    if target.accuracy is None or not target.stop:
        return False
    return time_to_target(run.folder, to_dict(run.config), trainer.state.step) is not None


def save_if_due(trainer: Trainer, recorder: Recorder) -> None:
    """Save a checkpoint after the current step if it is the last one or `checkpoint.every` requires it."""
    step = trainer.state.step
    if not is_due(step, trainer.config.checkpoint.every) and step != trainer.total_steps:
        return
    recorder.save(trainer.state_dict())
    if step < trainer.total_steps:  # after the last step, the final model is still written
        recorder.check_saves()


def pause(trainer: Trainer, run: Run, recorder: Recorder) -> None:
    """Evaluate by the validation problems, and mark the run as interrupted, so that it can be resumed."""
    evaluate_at_end(trainer, run, recorder)
    run.folder.update_status(state="interrupted")
    resume = resume_command(run.shown_path, foreign_targets(to_dict(run.config)))
    print(f"stopped after step {trainer.state.step} (until_step); resume with: {resume}")


def evaluate_at_end(trainer: Trainer, run: Run, recorder: Recorder) -> None:
    """Evaluate by the validation problems after the last step of this launch, unless that is done already."""
    name = f"step_{trainer.state.step:06d}"
    if run.config.eval.after and run.folder.evaluation(name) is None:
        recorder.evaluation(name, trainer.evaluate(trainer.experiment.problems.split_to_choose_by))


def _write_card(run: Run, folder: Path) -> None:
    try:
        from grpo.analysis.model_card import write_model_card  # imported here, since pandas takes a second

        write_model_card(run.folder, folder)
    except Exception as error:  # the model matters more
        logger.warning("no model card (%s: %s)", type(error).__name__, first_line(error))


def finish(trainer: Trainer, run: Run, recorder: Recorder) -> None:
    """Evaluate, save the model, write the report, and print what to do next."""
    if trainer.experiment.problems.validation:
        evaluate_at_end(trainer, run, recorder)
    after = run.folder.evaluation("after")
    if run.config.eval.after and (after is None or after["step"] != trainer.state.step):
        recorder.evaluation("after", trainer.evaluate("test"))
    experiment = trainer.experiment
    run.folder.save_final_model(
        experiment.save_policy(trainer.master),
        experiment.tokenizer.save_pretrained,
        lambda folder: _write_card(run, folder),
    )
    run.folder.update_status(state="finished")
    run.stop.ignore_signals()
    try:
        from grpo.analysis.run_report import write_run_report  # imported here, since matplotlib takes a second

        write_run_report(run.shown_path)
    except Exception as error:  # the run has finished, and the report can be written later
        command = grpo_command("report", path_argument("run_dir", run.folder.path))
        logger.warning("no report (%s: %s); try again: %s", type(error).__name__, first_line(error), command)
    try:
        recorder.finish()
    except Exception as error:  # as above
        logger.warning("no summary of the run (%s: %s)", type(error).__name__, first_line(error))
    grpo = run.config.grpo
    can_be_longer = grpo.lr_schedule == "constant" and grpo.num_iterations == 1
    further = f"grpo.num_steps={2 * grpo.num_steps}" if can_be_longer else None
    if trainer.state.step < trainer.total_steps:
        further = "target.stop=false"
    print(next_commands(run.shown_path, foreign_targets(to_dict(run.config)), further))
