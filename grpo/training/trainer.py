"""The steps of GRPO, following Algorithm 1 of DeepSeekMath (arXiv 2402.03300)."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Completions, Prompts
from grpo.config.errors import FileError
from grpo.config.objective_checks import kl_weight
from grpo.data.sampler import PromptSampler
from grpo.model.hardware import peak_memory_gb
from grpo.model.loading import refresh, working_copy
from grpo.model.lora import switch_adapter
from grpo.model.oom import TokenBudget
from grpo.model.packed import checkpoint_layers, supports_packing
from grpo.rollout.engine import RolloutEngine, sample_completions
from grpo.runs.checkpoint import TrainerState, load_weights, weights_of
from grpo.runs.optimizer_state import check_optimizer, flatten_optimizer, load_optimizer
from grpo.training.completion_store import CompletionStore, store_for
from grpo.training.evaluation import evaluate, store_key
from grpo.training.experiment import Experiment, compute_dtype
from grpo.training.groups import sample_groups
from grpo.training.metrics import (
    Timer,
    completion_metrics,
    ended,
    reward_metrics,
    sample_rows,
    sampling_metrics,
    some_weights,
    update_metrics,
)
from grpo.training.preflight import preflight
from grpo.training.scored_completions import compute_advantages
from grpo.training.update import (
    Batch,
    Counts,
    Gradient,
    LossScale,
    accumulate_gradient,
    all_logps,
    apply_gradient,
    learning_rate,
)

logger = logging.getLogger(__name__)

FINISH_STEP_IF_LEFT_S = 10.0  # a stop signal waits for the step in progress if that needs at most this long


@dataclass(frozen=True)
class Step:
    """A completed step."""

    row: dict[str, Any]  # the row of metrics.jsonl
    samples: list[dict[str, Any]]  # every completion with its rewards and advantage
    best_reward: float | None  # highest mean reward of a step so far
    skipped_in_a_row: int  # consecutive steps up to this one whose update was not finite
    skipped: Batch | None  # the batch, if loss or gradient of its last update was not finite


@dataclass(frozen=True)
class Update:
    """The result of one update of the policy, or of an attempt at one."""

    metrics: dict[str, float]
    logps: Tensor  # (B, T), log-probabilities before the update
    passed: Tensor  # (B,) bool, whether the policy computed a completion; else its log-probabilities are 0
    finite: bool  # whether loss and gradient were finite; else no weight was changed


class Trainer:
    """The policy with its optimizer, the frozen reference, and the state of training.

    It has no access to the run folder, tracker or console: `steps` yields what is written to them.
    """

    def __init__(self, experiment: Experiment) -> None:
        config = experiment.config
        dtype = compute_dtype(config)
        self.experiment = experiment
        self.config = config
        self.total_steps = config.grpo.num_iterations * config.grpo.num_steps
        self.master = experiment.load_policy()  # the weights that the optimizer changes
        # The model that samples and computes gradients: the master itself, or a copy in a narrower dtype.
        self.policy = self.master if self.master.dtype == dtype else working_copy(self.master, dtype)
        self.reference = experiment.reference(self.master) if kl_weight(config) > 0 else None
        if config.hardware.activation_checkpointing:
            checkpoint_layers(self.policy)
        self.optimizer = experiment.build_optimizer(self.master)
        self.sampler = PromptSampler(experiment.problems.train, config.seed, config.parent, config.sampling.curriculum)
        self.engine = experiment.build_engine(self.policy)
        self._engine_is_current = True  # False if the policy's weights have changed since the last sync
        self.sampling = experiment.sampling(self.master)
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.state = TrainerState()
        tokens = experiment.sizes.micro_batch_tokens
        self._reference_budget = TokenBudget("reference", tokens)
        self._update_budget = TokenBudget("update", tokens)
        self._states: dict[str, Any] = {}  # by part, after the last completed step or evaluation
        self._snapshot_states()
        self._step_started = 0.0
        self._step_seconds = math.inf  # of the last step; unknown before the first
        self._step_can_abort = False  # True while the work in progress has changed no weight
        self._is_updating = False  # from the first update of a step until its row is complete

    def steps(self, until: int) -> Iterator[Step]:
        """Iterate over the steps from the next one to `until`; each is run when it is requested."""
        for step in range(self.state.step + 1, until + 1):
            yield self.step(step)

    def step(self, step: int) -> Step:
        """Run one step: sample a batch, score it, update the policy `mu` times."""
        experiment = self.experiment
        sizes = self.experiment.sizes
        timer = Timer()
        self._step_started = time.perf_counter()
        self._step_can_abort = True
        iteration = (step - 1) // self.config.grpo.num_steps + 1
        if iteration > 1 and (step - 1) % self.config.grpo.num_steps == 0:
            self._renew_reference()
        groups, sampled = sample_groups(experiment, self.sampler, self.sampling, self._sample, step, timer)
        prompts, completions, scored = groups.prompts, groups.completions, groups.scored
        with timer("reward"):
            advantages = compute_advantages(experiment, scored, completions.ids.shape[1])  # (B,) or (B, T)
        batch = self._trained_on(Batch(prompts, completions, advantages.float().to(experiment.device)))
        with timer("reference"):
            if self.reference is not None:
                batch = replace(batch, ref_logps=self._reference_logps(batch))
        with timer("update"):
            rate = self._set_learning_rate(step)
            before = some_weights(self.master)
            updates = self._update_policy(batch)
            changed = some_weights(self.master).ne(before).float().mean().item()

        self._step_seconds = time.perf_counter() - self._step_started
        skipped = not updates[-1].finite
        tokens = sum(int(each.completions.lengths.sum()) for each in sampled)
        self._count(step, iteration, sum(each.num_tokens for each in sampled), skipped)
        row = {
            "step": step,
            "iteration": iteration,
            **update_metrics([update.metrics for update in updates]),
            **reward_metrics(scored, sizes.num_generations),
            **completion_metrics(completions, self.sampling.stop_ids),
            **sampling_metrics(batch.without(~updates[0].passed).completions, updates[0].logps),
            "weights_changed": changed,
            "learning_rate": rate,
            "num_tokens": self.state.num_tokens,
            "step_time": self._step_seconds,
            **timer.seconds,
            "perf/tokens_per_s": tokens / self._step_seconds,
            "perf/peak_memory_gb": peak_memory_gb(experiment.device),
        }
        if self.config.sampling.refill:
            row["sampling/refilled_groups"] = sum(len(each.problems) for each in sampled[1:])
        if self.loss_scale is not None:
            row["loss_scale"] = self.loss_scale.value
        rewards = [each for each in (self.state.best_reward, row["reward"]) if each is not None]
        self.state.best_reward = max(rewards, default=None)
        self._snapshot_states()
        samples = sample_rows(step, groups.problems, scored, completions, advantages)
        self._is_updating = False
        return Step(
            row,
            samples,
            best_reward=self.state.best_reward,
            skipped_in_a_row=self.state.skipped_in_a_row,
            skipped=batch if skipped else None,
        )

    def _sample(self, prompts: Prompts, keys: Tensor) -> Completions:
        """Sample B completions of P prompts; keys: (B, 2)."""
        engine = self._current_engine()
        group_size = self.experiment.sizes.num_generations
        completions = sample_completions(engine, prompts, self.sampling, group_size=group_size, keys=keys)
        engine.release()
        return completions

    def _trained_on(self, batch: Batch) -> Batch:
        """The part of a step's batch that enters the update."""
        settings = self.config.grpo
        if settings.mask_truncated_completions:
            batch = batch.without(~ended(batch.completions, self.sampling.stop_ids))
        if settings.train_on is not None:
            batch = batch.pruned(settings.train_on)
        return batch.counted() if settings.mask_truncated_completions else batch

    def _current_engine(self) -> RolloutEngine:
        """The rollout engine, with the current weights of the policy."""
        if not self._engine_is_current:
            self.engine.sync(self.policy)
            self._engine_is_current = True
        return self.engine

    def _count(self, step: int, iteration: int, tokens: int, skipped: bool) -> None:
        self.state.step = step
        self.state.iteration = iteration
        self.state.num_tokens += tokens
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if skipped else 0

    def _renew_reference(self) -> None:
        """Algorithm 1, line 3: at the start of an outer iteration the reference becomes the current policy."""
        if self.reference is not None:
            switch_adapter(self.reference, on=True)
            refresh(self.reference, self.master)

    def _reference_logps(self, batch: Batch) -> Tensor:
        """Log-probabilities (B, T) under the reference."""
        assert self.reference is not None
        reference = self.reference
        temperature = self.sampling.temperature
        return self._reference_budget.run(
            lambda token_budget: all_logps(reference, batch, temperature, token_budget),
            *batch.token_range(supports_packing(reference)),
        )

    def _update_policy(self, batch: Batch) -> list[Update]:
        """Algorithm 1, lines 10 and 11: `mu` updates on a batch, or fewer if one is not finite."""
        counts = batch.counts(self.experiment.sizes.max_completion_length)
        updates: list[Update] = []
        for _ in range(self.config.grpo.mu):
            update = self._update_once(batch, counts)
            updates.append(update)
            if not update.finite:
                break
            if batch.old_logps is None:  # before the first update the policy is the one that sampled
                batch = replace(batch, old_logps=update.logps)
        if any(update.finite for update in updates):
            self._engine_is_current = False
        return updates

    def _update_once(self, batch: Batch, counts: Counts) -> Update:
        """One update; in float16 it is repeated with a smaller loss scale while the gradient overflows."""
        scale = self.loss_scale
        before = 1.0 if scale is None else scale.value
        while True:
            gradient = self._gradient(batch, counts)
            self._step_can_abort = False
            self._is_updating = True
            norm, finite = apply_gradient(
                self.master,
                self.optimizer,
                gradient.loss,
                self.config.grpo.max_grad_norm,
                1.0 if scale is None else scale.value,
            )
            update = Update({**gradient.means(), "grad_norm": norm}, gradient.logps, gradient.passed, finite)
            if finite and self.policy is not self.master:
                refresh(self.policy, self.master)
            if finite and scale is not None:
                scale.count_update()
            if finite or scale is None or not math.isfinite(gradient.loss):
                return update
            if not scale.reduce():
                scale.value = before / 2  # no scale helps this batch
                return update
            logger.info("the gradient overflowed float16; trying again with the loss times %g", scale.value)

    def _gradient(self, batch: Batch, counts: Counts) -> Gradient:
        """Compute the gradient of the batch's loss into the parameters' `grad`."""

        def accumulate(token_budget: int) -> Gradient:
            for model in (self.master, self.policy):  # gradients left by an attempt that ran out of memory
                model.zero_grad(set_to_none=True)
            return accumulate_gradient(
                self.policy,
                self.experiment.objective,
                batch,
                counts,
                temperature=self.sampling.temperature,
                token_budget=token_budget,
                loss_scale=1.0 if self.loss_scale is None else self.loss_scale.value,
            )

        return self._update_budget.run(accumulate, *batch.token_range(supports_packing(self.policy)))

    def _set_learning_rate(self, step: int) -> float:
        grpo = self.config.grpo
        rate = learning_rate(self.config.optimizer["lr"], grpo.lr_schedule, step, self.total_steps, grpo.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def can_be_saved(self) -> bool:
        """Whether weights, optimizer and state all belong to the last completed step."""
        return not self._is_updating

    def should_abort_step(self) -> bool:
        """Whether a stop should abort the work: no weight has changed, and the time left is long or unknown."""
        left = self._step_seconds - (time.perf_counter() - self._step_started)
        return self._step_can_abort and not 0 <= left <= FINISH_STEP_IF_LEFT_S

    def completion_store(self) -> CompletionStore | None:
        """The store for evaluations of the current model, which other runs may start from, too; None: there is none."""
        return store_for(self.policy, self.config, store_key(self.experiment, self.sampling))

    def evaluate(self, split: str, store: CompletionStore | None = None) -> dict[str, Any]:
        """Evaluate on the problems of a split. Returns the content of eval/*.json. store: see `evaluation.evaluate`."""
        self._step_can_abort = True
        result = evaluate(self._current_engine(), self.sampling, self.experiment, self.state.step, split, store)
        self._step_can_abort = False
        self._after_evaluation()
        return result

    def preflight(self) -> dict[str, Any]:
        """Run the pre-flight with the untrained model. Returns the content of preflight.json."""
        found = preflight(self._current_engine(), self.sampling, self.sampler, self.experiment)
        self._after_evaluation()
        return found

    def _after_evaluation(self) -> None:
        """Remember the states; before step 1, which no checkpoint precedes, restore them instead."""
        if self.state.step > 0:
            self._snapshot_states()
            return
        for name, state in self._states.items():
            self._stateful()[name].load_state_dict(deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on. The tensors are not copied.

        model, optimizer: tensors by name. reference: likewise, or None if it is the starting model, and at the end of
        an iteration, when it is no longer needed. trainer: a TrainerState.
        """
        within_iteration = self.state.step % self.config.grpo.num_steps != 0
        needed = self.reference is not None and self.state.iteration > 1 and within_iteration
        state = replace(
            self.state,
            loss_scale=None if self.loss_scale is None else asdict(self.loss_scale),
            states=deepcopy({name: state for name, state in self._states.items() if state}),
            engine=self.config.rollout["_target_"],
        )
        return {
            "model": weights_of(self.master),
            "optimizer": flatten_optimizer(self.optimizer),
            "reference": weights_of(self.reference) if needed and self.reference is not None else None,
            "trainer": state,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Call it only once, on a new trainer.

        The optimizer is loaded last, to keep peak memory low. Raises FileError if the weights, the optimizer or
        another state do not fit.
        """
        parent = self.config.parent or {}
        last_update = saved["trainer"].step - saved["trainer"].skipped_in_a_row  # steps after it had no finite gradient
        starts_anew = bool(parent.get("fresh_optimizer")) and last_update <= parent["step"]
        # Before any weight is changed. The new optimizer is not kept, since it takes memory.
        check_optimizer(saved, self.experiment.build_optimizer(self.master), starts_anew)
        self.state = replace(saved["trainer"])
        with_states = self._stateful()
        states = dict(self.state.states)
        if self.state.engine != self.config.rollout["_target_"]:  # a fork with another engine
            states.pop("rollout", None)
        for name, state in states.items():
            try:
                with_states[name].load_state_dict(state)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise FileError(f"the checkpoint has a state of '{name}' that does not fit: {error!r}") from error
        if self.loss_scale is not None and self.state.loss_scale is not None:
            self.loss_scale = LossScale.restored(self.state.loss_scale)
        load_weights(saved["model"], self.master)
        if self.reference is not None and saved["reference"] is not None:
            switch_adapter(self.reference, on=True)
            load_weights(saved["reference"], self.reference)
        if self.policy is not self.master:
            refresh(self.policy, self.master)
        self._engine_is_current = False
        load_optimizer(saved["optimizer"], self.optimizer)
        self._snapshot_states()

    def _snapshot_states(self) -> None:
        """Remember the states, so that an aborted step leaves no trace in a checkpoint."""
        stateful = {name: part for name, part in self._stateful().items() if hasattr(part, "state_dict")}
        states = {name: part.state_dict() for name, part in stateful.items()}
        try:
            self._states = json.loads(json.dumps(states))  # a copy in the form that a checkpoint stores
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"rollout._target_={self.config.rollout['_target_']}: its state_dict() must hold JSON values: {error}"
            ) from error

    def _stateful(self) -> dict[str, Any]:
        """The parts that may have a state, by their name in a checkpoint."""
        return {
            "rollout": self.engine,
            "sampler": self.sampler,
            "reference": self._reference_budget,
            "update": self._update_budget,
        }
