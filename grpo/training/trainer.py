"""The training loop: GRPO as Algorithm 1 of DeepSeekMath (arXiv 2402.03300) has it."""

import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.algorithm.advantage import group_advantages
from grpo.analysis.doctor import Doctor
from grpo.config.checks import kl_weight
from grpo.config.errors import ConfigError
from grpo.data.prompts import problems_of_step
from grpo.model.hardware import peak_memory_gb
from grpo.model.loading import refresh, working_copy
from grpo.model.lora import switch_adapter
from grpo.model.packed import checkpoint_layers, packs
from grpo.runs import checkpoint as checkpoints
from grpo.runs.checkpoint import TrainerState
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.run import Run
from grpo.runs.saver import Saver
from grpo.runs.tracking import Tracker
from grpo.training.evaluation import evaluate
from grpo.training.experiment import Setup, compute_dtype, score_completions
from grpo.training.metrics import (
    Timer,
    completion_metrics,
    evaluation_metrics,
    reward_metrics,
    sample_rows,
    sampling_metrics,
    update_metrics,
)
from grpo.training.preflight import lines, preflight
from grpo.training.update import (
    Batch,
    LossScale,
    accumulate_gradient,
    all_logps,
    apply_gradient,
    learning_rate,
)

logger = logging.getLogger(__name__)

WORTH_FINISHING_S = 10.0  # a stop waits for the step in progress where no more than this seems left of it


@dataclass(frozen=True)
class Step:
    """A completed step."""

    row: dict[str, Any]  # of metrics.jsonl
    samples: list[dict[str, Any]]  # every completion with what it earned
    skipped: Batch | None  # the batch whose loss or gradient was not finite, so that no update was made


class Trainer:
    """The policy with its optimizer, the frozen reference, and how far they have come."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.total_steps = setup.config.grpo.num_iterations * setup.config.grpo.num_steps
        self.policy = setup.load_policy()
        dtype = compute_dtype(setup.config)
        # What reads and writes tokens: the policy itself, or a copy in a narrower dtype that follows its updates.
        self.worker = self.policy if self.policy.dtype == dtype else working_copy(self.policy, dtype)
        self.reference = setup.reference(self.policy) if kl_weight(setup.config) > 0 else None
        if setup.config.hardware.activation_checkpointing:
            checkpoint_layers(self.worker)
        self.optimizer = self._new_optimizer()
        self.sampling = setup.sampling(self.policy)
        self.state = TrainerState()
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.cut = setup.cut(self.state.reduced)
        self.doctor = Doctor()
        self._step_started = 0.0
        self._step_seconds = math.inf  # what the last step took; unknown before the first
        self._interruptible = False  # whether what goes on could be dropped, since the policy has not moved in it
        self._saving_s = 0.0  # seconds that the last save held up: reported by the step after it

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return self.setup.optimizer([(name, p) for name, p in self.policy.named_parameters() if p.requires_grad])

    def step(self, step: int) -> Step:
        """One step of the algorithm: sample a batch, score it, update the policy `mu` times."""
        grpo, sizes, setup, timer = self.config.grpo, self.setup.sizes, self.setup, Timer()
        self._step_started, self._interruptible = time.perf_counter(), True
        iteration = (step - 1) // grpo.num_steps + 1
        problems = problems_of_step(setup.problems.train, self.config.seed, step, sizes.batch_size)
        prompts = setup.prompt_batch(setup.conversations(problems))
        with timer("rollout"):
            completions = setup.complete(
                self.worker, prompts, self.sampling, self.cut, group_size=sizes.num_generations, step=step
            )
        with timer("reward"):
            scored = score_completions(setup, problems, completions)
            rewards = scored.rewards.total.view(sizes.batch_size, sizes.num_generations)
            advantages = group_advantages(rewards).flatten()
        batch = Batch(prompts, completions, advantages.float().to(setup.device))
        with timer("reference"):
            if self.reference is not None:
                if iteration > 1 and (step - 1) % grpo.num_steps == 0:  # a new outer iteration: Algorithm 1, line 3
                    switch_adapter(self.reference, on=True)
                    refresh(self.reference, self.policy)
                batch = replace(batch, ref_logps=self._reference_logps(self.reference, batch))
        with timer("update"):
            rate = self._set_learning_rate(step)
            updates, logps, skipped = self._updates(batch)

        self._step_seconds = time.perf_counter() - self._step_started
        tokens = int(completions.attention_mask.sum())
        self.state.num_tokens += tokens + int(prompts.mask.sum()) * sizes.num_generations
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0
        row = {
            "step": step,
            "iteration": iteration,
            **update_metrics(updates),
            **reward_metrics(scored, sizes.num_generations),
            **completion_metrics(completions, self.sampling.stop_ids),
            **sampling_metrics(completions, logps),
            "learning_rate": rate,
            "num_tokens": self.state.num_tokens,
            "step_time": self._step_seconds,
            **timer.seconds,
            "timing_s/checkpoint": self._saving_s,
            "perf/tokens_per_s": tokens / self._step_seconds,
            "perf/peak_memory_gb": peak_memory_gb(setup.device),
        }
        self._saving_s = 0.0
        if self.loss_scale is not None:
            row["loss_scale"], self.state.loss_scale = self.loss_scale.value, asdict(self.loss_scale)
        best = self.state.best_reward
        self.state.best_reward = row["reward"] if best is None else max(best, row["reward"])
        self.state.step, self.state.iteration = step, iteration
        return Step(row, sample_rows(step, problems, scored, advantages), batch if skipped else None)

    def can_be_dropped(self) -> bool:
        """Whether a stop should not wait for what goes on: it takes long still or nobody knows, and can be dropped."""
        left = self._step_seconds - (time.perf_counter() - self._step_started)
        return self._interruptible and not 0 <= left <= WORTH_FINISHING_S

    def _reference_logps(self, reference: PreTrainedModel, batch: Batch) -> Tensor:
        def read(token_budget: int) -> Tensor:
            return all_logps(reference, batch, self.sampling.temperature, token_budget)

        return self.cut.run("reference", read, *batch.token_range(packs(reference)))

    def _updates(self, batch: Batch) -> tuple[list[dict[str, float]], Tensor, bool]:
        """Update the policy `mu` times.

        Returns the metrics of each, the log-probabilities (B, T) before the first, and whether one was not finite.
        """
        metrics, first, finite = self._update(batch)
        results = [metrics]
        batch = replace(batch, old_logps=first)  # those of the policy that sampled, for the updates after the first
        while finite and len(results) < self.config.grpo.mu:
            metrics, _, finite = self._update(batch)
            results.append(metrics)
        return results, first, not finite

    def _update(self, batch: Batch) -> tuple[dict[str, float], Tensor, bool]:
        """One update: its metrics, the log-probabilities (B, T) before it, and whether it was finite and so made."""
        scale = self.loss_scale
        before = 1.0 if scale is None else scale.value
        while True:
            metrics, logps = self._gradient(batch)
            self._interruptible = False
            norm, finite = apply_gradient(
                self.policy,
                self.optimizer,
                metrics["loss"],
                self.config.grpo.max_grad_norm,
                1.0 if scale is None else scale.value,
            )
            if finite and self.worker is not self.policy:
                refresh(self.worker, self.policy)
            if finite and scale is not None:
                scale.updated()
            if finite or scale is None or not math.isfinite(metrics["loss"]):
                return metrics | {"grad_norm": norm}, logps, finite
            if not scale.again():
                scale.value = before / 2  # it is this batch that no scale helps
                return metrics | {"grad_norm": norm}, logps, finite
            logger.info("a gradient was too large for float16; again with the loss times %g", scale.value)

    def _gradient(self, batch: Batch) -> tuple[dict[str, float], Tensor]:
        def accumulate(token_budget: int) -> tuple[dict[str, float], Tensor]:
            for model in (self.policy, self.worker):  # of a try that ran out of memory
                model.zero_grad(set_to_none=True)
            return accumulate_gradient(
                self.worker,
                self.setup.objective,
                batch,
                temperature=self.sampling.temperature,
                token_budget=token_budget,
                loss_scale=1.0 if self.loss_scale is None else self.loss_scale.value,
            )

        return self.cut.run("update", accumulate, *batch.token_range(packs(self.worker)))

    def _set_learning_rate(self, step: int) -> float:
        grpo = self.config.grpo
        rate = learning_rate(self.config.optimizer["lr"], grpo.lr_schedule, step, self.total_steps, grpo.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def record(self, run: Run, tracker: Tracker, saver: Saver, done: Step) -> None:
        """Write down a completed step, evaluate and save where it is time. RuntimeError where too many were skipped."""
        row, step, config = done.row, done.row["step"], self.config
        run.folder.append_metrics(row)
        tracker.log(row)
        if due(step, config.samples.every):
            with disk_errors_are_warnings(f"the samples of step {step}"):
                run.folder.write_samples(step, done.samples)
        if due(step, config.tracking.completions_every):
            tracker.log_completions(step, done.samples)
        if done.skipped is not None:
            self._note_skipped(run, done, done.skipped)
        with disk_errors_are_warnings(f"{run.folder.path}/status.json"):
            run.folder.update_status(
                step=step,
                iteration=row["iteration"],
                total_steps=self.total_steps,
                best_reward=self.state.best_reward,
                seconds=run.seconds,
                saved_step=saver.saved_step,
            )
        self.evaluate_if_due(run, tracker, saver)
        if due(step, config.checkpoint.every) or step == self.total_steps:
            self.save(run, saver)
            if step < self.total_steps:  # at the end, the final model is written all the same
                saver.check()

    def preflight_if_due(self, run: Run) -> None:
        """Before the first step, say whether there is anything to learn from."""
        if not self.config.preflight or self.state.step > 0 or run.folder.preflight_file.exists():
            return
        found = preflight(self.worker, self.setup, self.cut)
        run.folder.write_preflight(found)
        for text in found["warnings"]:
            logger.info("pre-flight: %s", text)
        print("\n".join(lines(found, self.setup.sizes.max_completion_length)), flush=True)

    def evaluate_if_due(self, run: Run, tracker: Tracker, saver: Saver) -> None:
        """Evaluate after the present step if `eval.every` says so, and keep the weights if they are the best so far."""
        step = self.state.step
        if self.state.evaluated_step == step or not due(step, self.config.eval.every):
            return
        self._interruptible = True
        accuracy = self.evaluate(run, tracker, f"step_{step:06d}")["accuracy"]
        self._interruptible = False
        self.state.evaluated_step = step
        best = self.state.best_accuracy
        if accuracy is not None and (best is None or accuracy > best):
            self.state.best_accuracy = accuracy
            saver.save_best(self.policy, self.state)

    def _note_skipped(self, run: Run, done: Step, batch: Batch) -> None:
        """Keep the batch of a step that was not finite for inspection, and end the run after too many in a row."""
        step, limit = self.state.step, self.config.grpo.max_skipped_steps
        place = run.folder.write_skipped(step, batch.tensors(), done.samples)
        numbers = f"loss {done.row['loss']} and gradient norm {done.row['grad_norm']} (null: not finite)"
        logger.warning("step %d: %s, so no update was made; its batch is in %s", step, numbers, place)
        if self.state.skipped_in_a_row > limit:
            raise RuntimeError(
                f"loss or gradient was not finite in {self.state.skipped_in_a_row} steps in a row; their batches are "
                f"in {place.parent}; usually optimizer.lr is too high or model.dtype too narrow"
            )

    def save(self, run: Run, saver: Saver) -> None:
        """A checkpoint of the last completed step, unless there is one; older ones go, as configured."""
        started = time.perf_counter()
        run.folder.sync_metrics()  # a checkpoint counts on the rows of all its steps
        # At the end of an iteration the policy becomes the next reference, and that of the iteration is done with.
        needed = self.state.iteration > 1 and self.state.step % self.config.grpo.num_steps != 0
        before = saver.saved_step
        saver.save(self.policy, self.optimizer, self.reference if needed else None, self.state)
        if saver.saved_step != before:  # written already, and not beside training: then the next step records it
            with disk_errors_are_warnings(f"{run.folder.path}/status.json"):
                run.folder.update_status(saved_step=saver.saved_step)
        self._saving_s = time.perf_counter() - started

    def save_and_wait(self, run: Run, saver: Saver) -> None:
        """The same before leaving."""
        self.save(run, saver)
        saver.close()

    def restore(self, run: Run) -> list[dict[str, Any]]:
        """Take up the newest intact checkpoint, if there is one. Returns the metrics rows up to it."""
        latest = checkpoints.latest_checkpoint(run.folder.checkpoints) if run.resumed else None
        if latest is not None:
            self.load(latest)
        elif run.config.parent is not None and run.resumed:
            raise RuntimeError(f"{run.folder.checkpoints} is empty, so the fork has lost where it began; fork anew")
        elif run.resumed and (saved := run.folder.saved_step()) > 0:
            raise ConfigError(
                f"{run.folder.checkpoints} has no checkpoint, but the run has saved one at step {saved}; bring its "
                "checkpoints back, or start a new run"
            )
        if run.resumed:
            logger.info("going on after step %d", self.state.step)
        rows = run.folder.cut_metrics(self.state.step)
        known = run.folder.training_evaluations(self.state.step).values()
        self.doctor.replay(rows, known)  # what there was to say of these has been said
        return rows

    def load(self, checkpoint: Path) -> None:
        """Stand where a checkpoint stands. The optimizer comes last, so that memory peaks no higher than in training.

        Raises RuntimeError where it does not fit the model, FileError where it does not fit the optimizer.
        """
        checkpoints.check_optimizer(checkpoint, self._new_optimizer())  # before the weights, which this changes
        self.state = checkpoints.load_state(checkpoint)
        self.cut = self.setup.cut(self.state.reduced)
        if self.loss_scale is not None and self.state.loss_scale is not None:
            self.loss_scale = LossScale(**self.state.loss_scale)
        checkpoints.load_weights(checkpoint, self.policy)
        reference = checkpoints.reference_of(checkpoint)
        if self.reference is not None and reference is not None:
            switch_adapter(self.reference, on=True)
            checkpoints.load_weights(reference, self.reference)
        if self.worker is not self.policy:
            refresh(self.worker, self.policy)
        checkpoints.load_optimizer(checkpoint, self.optimizer)

    def evaluate(self, run: Run, tracker: Tracker, name: str) -> dict[str, Any]:
        """Evaluate the policy on the held-out problems and record it as eval/<name>.json."""
        result = evaluate(self.worker, self.setup, self.cut, self.state.step)
        run.folder.write_evaluation(name, result)
        tracker.log_evaluation(name, self.state.step, evaluation_metrics(result))
        self.doctor.evaluated(result)
        return result


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0
