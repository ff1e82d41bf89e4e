"""Forks: new runs that continue from a checkpoint of another run, with any changes of the settings."""

import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from grpo.config.checks import check_lineage, check_unused_overrides, kl_weight
from grpo.config.compose import apply_overrides
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import Config
from grpo.config.trust import check_trusted
from grpo.config.values import copy_value, escape
from grpo.data.sampler import problems_before
from grpo.launch.freeze import freeze
from grpo.runs.checkpoint import (
    MANIFEST,
    TrainerState,
    find_damage,
    latest_checkpoint,
    load_state,
    reference_of,
    step_folder,
    step_folders,
)
from grpo.runs.files import read_json, step_of, sync
from grpo.runs.folder import RunFolder
from grpo.training.digests import kept_by_fork


def fork(folder: RunFolder, cfg: DictConfig, overrides: Overrides) -> Config:
    """Create in `folder` a run that continues from a checkpoint of the run in `cfg.run_dir`. Returns its config.

    The fork gets the checkpoint, the metrics and evaluations up to its step, and the parent's settings with the
    overrides of the command line. `parent` in its config.yaml records its origin. Raises ConfigError if the fork is not
    possible.
    """
    parent = RunFolder(cfg.run_dir)
    source = _checkpoint(parent, cfg.fork_step)
    state = load_state(source)
    before = parent.frozen_config()
    frozen = apply_overrides(before, cfg, overrides)
    check_trusted(frozen, cfg, parent.path)
    manifest = read_json(source / MANIFEST)
    values: Any = OmegaConf.to_container(before, resolve=True)  # a dict
    check_lineage(values["parent"])
    used = problems_before(state.step + 1, values["grpo"]["batch_size"], values["parent"])
    lineage = {"run_dir": str(parent.path), "step": state.step, "num_problems": used, "parent": values["parent"]}
    frozen.parent = escape(lineage | {"weights_sha256": manifest["files"]["model.safetensors"]["sha256"]})
    if cfg.tracking.group is not None:  # for example the group of a sweep
        copy_value(cfg, "tracking.group", frozen)
        copy_value(cfg, "tracking.tags", frozen)
    copy_value(cfg, "tracking.name", frozen)
    frozen.accept_changes = cfg.accept_changes
    config = freeze(frozen)
    check_unused_overrides(config, overrides)
    _check_steps(config, state, reference_of(source))
    if config.optimizer["_target_"] != before.optimizer._target_:
        raise ConfigError(
            f"optimizer._target_={config.optimizer['_target_']}: the checkpoint holds the states of "
            f"{before.optimizer._target_}; keep that, or start a new run with model.name={parent.final_model}"
        )

    history = parent.metrics_of_steps(state.step)
    best = parent.checkpoints / "best"
    has_best = find_damage(best) is None and load_state(best).step <= state.step
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # left by a killed attempt to fork
    for part in (source, reference_of(source), best if has_best else None):
        if part is not None:
            _link_or_copy(part, folder.checkpoints / part.name)
    folder.write_metrics(history)
    for name, result in parent.training_evaluations(state.step).items():
        folder.write_evaluation(name, result)
    folder.update_digests(kept_by_fork(parent.digests(), overrides.keys))
    folder.write_config(config)  # last, since with this file the folder is a run
    folder.update_status(
        state="running", iteration=state.iteration, step=state.step, best_reward=state.best_reward, error=None
    )
    return config


def _checkpoint(parent: RunFolder, step: int | None) -> Path:
    kept = ", ".join(str(step_of(path)) for path in step_folders(parent.checkpoints)) or "none"
    if step is None:
        checkpoint = latest_checkpoint(parent.checkpoints)
        if checkpoint is None:
            raise ConfigError(f"fork=true: {parent.path} has no checkpoint to start from yet")
        return checkpoint
    checkpoint = step_folder(parent.checkpoints, step)
    if not checkpoint.exists():
        raise ConfigError(f"fork_step={step}: {parent.path} keeps no checkpoint of that step, but of: {kept}")
    problem = find_damage(checkpoint)
    if problem is not None:
        raise ConfigError(f"fork_step={step}: {checkpoint} is damaged ({problem}); kept are: {kept}")
    return checkpoint


def _check_steps(config: Config, state: TrainerState, reference: Path | None) -> None:
    grpo = config.grpo
    total = grpo.num_iterations * grpo.num_steps
    if total <= state.step:
        raise ConfigError(
            f"the fork would start at step {state.step} of {total}: nothing is left to do; "
            f"set a larger grpo.num_steps, or an earlier fork_step"
        )
    within = state.step % grpo.num_steps != 0
    if kl_weight(config) > 0 and state.iteration > 1 and within and reference is None:
        raise ConfigError(
            f"beta={kl_weight(config):g}: the checkpoint has no reference of its iteration {state.iteration}, since "
            "beta was 0; use a fork_step at the end of an iteration"
        )
    iteration = (state.step - 1) // grpo.num_steps + 1
    if iteration != state.iteration:
        raise ConfigError(
            f"with grpo.num_steps={grpo.num_steps} step {state.step} would be of iteration {iteration}, but the "
            f"checkpoint is of iteration {state.iteration}, with its reference; keep grpo.num_steps"
        )


def _link_or_copy(source: Path, target: Path) -> None:
    """Copy a folder, by hard links if possible: checkpoint files are never changed in place, so they can be shared."""
    target.mkdir(parents=True)
    for file in filter(Path.is_file, source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
    for path in [*target.iterdir(), target, target.parent]:
        sync(path)
