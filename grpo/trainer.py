"""The training loop: GRPO as Algorithm 1 of DeepSeekMath (arXiv 2402.03300) has it."""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from grpo.algorithm.advantage import group_advantages
from grpo.algorithm.step import Batch, all_logps, learning_rate, update
from grpo.config import to_dict
from grpo.data.prompts import problems_of_step
from grpo.engine.hardware import peak_memory_gb
from grpo.engine.rollout import rollout
from grpo.evaluation import evaluate
from grpo.metrics import completion_metrics, reward_metrics, sample_rows, update_metrics
from grpo.run import checkpoint as checkpoints
from grpo.run.checkpoint import TrainerState
from grpo.run.console import StepDisplay, closing_table, next_commands
from grpo.run.session import Run
from grpo.run.tracking import Tracker, tracking
from grpo.setup import Setup, prepare, score_completions

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Train from wherever the run folder stands to its end. SystemExit after SIGINT or SIGTERM, with all saved."""
    setup = prepare(run.config)
    trainer = Trainer(setup)
    rows = trainer.restore(run)
    if run.config.grpo.mu == 1:
        logger.info("mu=1: the ratio is 1 at every update, so the loss says little; its gradient is what counts")
    console = Console()
    print(f"{'going on in' if run.resumed else 'run folder'} {run.folder.path}")
    with tracking(to_dict(run.config), run.folder.path, resumed=run.resumed, rows=rows) as tracker:
        print("".join(f"{line}\n" for line in tracker.how_to_look), end="", flush=True)
        run.folder.update_status(total_steps=trainer.total_steps, step=trainer.state.step)
        if run.config.eval.before and trainer.state.step == 0 and run.folder.evaluation("before") is None:
            before = trainer.evaluate(run, tracker, "before")
            console.print(f"before training: {before['accuracy']:.1%} of {before['n']} held-out problems right")
        display = StepDisplay(console, trainer.total_steps, trainer.state.step + 1)
        with display.shown():
            for step in range(trainer.state.step + 1, trainer.total_steps + 1):
                with run.stop.deferred():
                    row, samples = trainer.step(step)
                    trainer.record(run, tracker, row, samples)
                    display.update(row)
                    if run.stop.received:
                        trainer.save(run)
                        raise SystemExit(run.stop.exit_code)
        trainer.finish(run, tracker, console)


class Timer:
    """Seconds spent in the named parts of a step, as `timing_s/<part>`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"timing_s/{part}"] = time.perf_counter() - started


class Trainer:
    """The policy with its optimizer, the frozen reference, and how far they have come."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.total_steps = setup.config.grpo.num_iterations * setup.config.grpo.num_steps
        self.policy = setup.load_policy()
        self.reference = frozen_copy(self.policy) if setup.config.grpo.beta > 0 else None
        self.optimizer = setup.optimizer(self.policy.parameters())
        self.sampling = setup.sampling(self.policy)
        self.state = TrainerState()
        self._saved_step = 0  # the step of the last checkpoint
        self._saving_s = 0.0  # seconds that the last save took: reported by the step after it

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One step of the algorithm: sample a batch, score it, update the policy `mu` times.

        Returns the metrics row, and every completion with what it earned.
        """
        grpo, setup, timer, started = self.config.grpo, self.setup, Timer(), time.perf_counter()
        iteration = (step - 1) // grpo.num_steps + 1
        if iteration > 1 and (step - 1) % grpo.num_steps == 0 and self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())  # a new outer iteration: Algorithm 1, line 3

        problems = problems_of_step(setup.problems.train, self.config.seed, step, grpo.batch_size)
        prompts = setup.prompt_batch(setup.conversations(problems))
        with timer("rollout"), setup.autocast():
            completions = rollout(
                self.policy,
                prompts,
                grpo.num_generations,
                self.sampling,
                seed=self.config.seed,
                step=step,
                rows_at_once=self.config.hardware.rollout_rows,
            )
        with timer("reward"):
            scored = score_completions(setup, problems, completions)
            rewards = scored.rewards.total.view(grpo.batch_size, grpo.num_generations)
            advantages = group_advantages(rewards).flatten()
        batch = Batch(prompts, completions, advantages.float().to(setup.device))
        with timer("reference"):
            if self.reference is not None:
                batch = replace(batch, ref_logps=self._logps(self.reference, batch))
        with timer("update"):
            rate = self._set_learning_rate(step)
            updates = self._updates(batch)

        step_time = time.perf_counter() - started
        tokens = int(completions.mask.sum())
        self.state.num_tokens += tokens + int(prompts.mask.sum()) * grpo.num_generations
        row = {
            "step": step,
            "iteration": iteration,
            **update_metrics(updates),
            **reward_metrics(scored, grpo.num_generations),
            **completion_metrics(completions, self.sampling.stop_ids),
            "learning_rate": rate,
            "num_tokens": self.state.num_tokens,
            "step_time": step_time,
            **timer.seconds,
            "timing_s/checkpoint": self._saving_s,
            "perf/tokens_per_s": tokens / step_time,
            "perf/peak_memory_gb": peak_memory_gb(setup.device),
        }
        self._saving_s = 0.0
        self.state.step, self.state.iteration = step, iteration
        best = self.state.best_reward
        self.state.best_reward = row["reward"] if best is None else max(best, row["reward"])
        return row, sample_rows(step, problems, scored, advantages)

    def _logps(self, model: PreTrainedModel, batch: Batch):
        with self.setup.autocast():
            return all_logps(model, batch, self.sampling.temperature, self.config.hardware.micro_batch_size)

    def _updates(self, batch: Batch) -> list[dict[str, float]]:
        results = []
        for _ in range(self.config.grpo.mu):
            metrics, logps = update(
                self.policy,
                self.optimizer,
                self.setup.objective,
                batch,
                temperature=self.sampling.temperature,
                micro_batch_size=self.config.hardware.micro_batch_size,
                max_grad_norm=self.config.grpo.max_grad_norm,
                autocast=self.setup.autocast,
            )
            results.append(metrics)
            if batch.old_logps is None:  # those of the policy that sampled, for the updates after the first
                batch = replace(batch, old_logps=logps)
        return results

    def _set_learning_rate(self, step: int) -> float:
        grpo = self.config.grpo
        rate = learning_rate(self.config.optimizer["lr"], grpo.lr_schedule, step, self.total_steps, grpo.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def record(self, run: Run, tracker: Tracker, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write down a completed step, evaluate and save where it is time."""
        step, config = row["step"], self.config
        run.folder.append_metrics(row)
        tracker.log(row)
        if due(step, config.samples.every):
            run.folder.write_samples(step, samples)
        if due(step, config.tracking.completions_every):
            tracker.log_completions(step, samples)
        if due(step, config.eval.every):
            accuracy = self.evaluate(run, tracker, f"step_{step:06d}")["accuracy"]
            if self.state.best_accuracy is None or accuracy > self.state.best_accuracy:
                self.state.best_accuracy = accuracy
                checkpoints.save_best(run.folder.checkpoints, self.policy, self.state)
        if due(step, config.checkpoint.every) or step == self.total_steps:
            self.save(run)
        run.folder.update_status(
            step=step, iteration=row["iteration"], total_steps=self.total_steps, best_reward=self.state.best_reward
        )

    def save(self, run: Run) -> None:
        """A checkpoint of the present step, unless there is one; older ones go, as configured."""
        if self._saved_step == self.state.step:
            return
        started = time.perf_counter()
        moved = self.reference is not None and self.state.iteration > 1
        folder = run.folder.checkpoints
        reference = self.reference if moved else None
        newest = checkpoints.save_checkpoint(folder, self.policy, self.optimizer, reference, self.state)
        checkpoints.keep_last(newest, self.config.checkpoint.keep_last)
        self._saving_s, self._saved_step = time.perf_counter() - started, self.state.step

    def restore(self, run: Run) -> list[dict[str, Any]]:
        """Take up the newest intact checkpoint, if there is one. Returns the metrics rows up to it."""
        latest = checkpoints.latest_checkpoint(run.folder.checkpoints) if run.resumed else None
        if latest is not None:
            self.state = checkpoints.load_state(latest)
            checkpoints.load_weights(latest, self.policy)
            checkpoints.load_optimizer(latest, self.optimizer)
            if self.reference is not None and self.state.iteration > 1:
                checkpoints.load_weights(latest, self.reference, "reference")
        if run.resumed:
            logger.info("going on after step %d", self.state.step)
        rows = run.folder.cut_metrics(self.state.step)
        if [row["step"] for row in rows] != list(range(1, self.state.step + 1)):
            raise RuntimeError(f"{run.folder.metrics_file} lacks rows of the {self.state.step} steps already made")
        return rows

    def evaluate(self, run: Run, tracker: Tracker, name: str) -> dict[str, Any]:
        """Evaluate the policy on the held-out problems and record it as eval/<name>.json."""
        result = evaluate(self.policy, self.setup, self.state.step)
        run.folder.write_evaluation(name, result)
        tracker.log_evaluation(
            name,
            self.state.step,
            {key: result[key] for key in ("accuracy", "reward", "completions/mean_length")}
            | {f"rewards/{key}": value for key, value in result["rewards"].items()},
        )
        return result

    def finish(self, run: Run, tracker: Tracker, console: Console) -> None:
        """Evaluate, save the model, draw the charts, and say what to do next."""
        from grpo.analysis.charts import write_charts  # here, since matplotlib takes a second to import

        after = run.folder.evaluation("after")
        if self.config.eval.after and (after is None or after["step"] != self.state.step):
            self.evaluate(run, tracker, "after")
        run.folder.save_final_model(self.policy, self.setup.tokenizer)
        run.folder.update_status(state="finished")
        write_charts(run.folder.path)
        evaluations = {name: run.folder.evaluation(name) for name in ("before", "after")}
        if any(evaluations.values()):
            console.print(closing_table(evaluations))
        tracker.set_summary({f"{k}_accuracy": v["accuracy"] for k, v in evaluations.items() if v})
        grpo = self.config.grpo
        extensible = grpo.lr_schedule == "constant" and grpo.num_iterations == 1
        print(next_commands(run.folder.path, f"grpo.num_steps={2 * grpo.num_steps}" if extensible else None))


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that takes no gradient."""
    return copy.deepcopy(model).requires_grad_(False)
