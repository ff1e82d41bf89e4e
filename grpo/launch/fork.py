"""Forks: new runs that continue from a checkpoint of another run, with any changes of the settings."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from grpo.config.checks import check_lineage
from grpo.config.command_line import arguments_in_shell, grpo_command, path_argument, path_override
from grpo.config.compose import apply_overrides
from grpo.config.errors import ConfigError
from grpo.config.objective_checks import check_unused_overrides, kl_weight, unused_overrides
from grpo.config.overrides import Overrides
from grpo.config.paths import CONF_DIR
from grpo.config.schema import PROMPT_KEYS, Config
from grpo.config.trust import check_trusted
from grpo.config.values import copy_value, escape, to_dict
from grpo.data.sampler import problems_before
from grpo.data.splits import is_same_data
from grpo.launch.freeze import freeze
from grpo.runs.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    TrainerState,
    commit_checkpoint,
    find_damage,
    latest_checkpoint,
    load_state,
    named_checkpoint,
    reference_of,
    step_folder,
)
from grpo.runs.files import read_json, sync
from grpo.runs.folder import RunFolder
from grpo.training.digests import check_digests, config_digest, kept_by_fork

logger = logging.getLogger(__name__)


def fork(folder: RunFolder, cfg: DictConfig, overrides: Overrides) -> Config:
    """Create in `folder` a run that continues from a checkpoint of the run in `cfg.run_dir`. Returns its config.

    The fork gets the checkpoint, the metrics up to its step and, unless it evaluates in another way, the evaluations up
    to it, and the parent's settings with the overrides of the command line. `parent` in its config.yaml records its
    origin. Raises ConfigError if the fork is not possible.
    """
    parent = RunFolder(cfg.run_dir)
    source = _checkpoint(parent, cfg.fork_step)
    state = load_state(source)
    before = parent.frozen_config()
    check_digests(parent, {"config": config_digest(parent)}, (), cfg.accept_changes)
    frozen = apply_overrides(before, cfg, overrides, _config_folders())
    check_trusted(frozen, cfg, parent.path)
    _keep_validation(frozen, before, overrides)
    manifest = read_json(source / MANIFEST)
    values: Any = OmegaConf.to_container(before, resolve=True)  # a dict
    check_lineage(values["parent"])
    used = problems_before(state.step + 1, values["grpo"]["batch_size"], values["parent"])
    lineage = {"run_dir": str(parent.path), "step": state.step, "num_problems": used, "parent": values["parent"]}
    lineage |= {"weights_sha256": manifest["files"]["model.safetensors"]["sha256"]}
    # An optimizer cannot continue with the states of another one, and best/ has none.
    fresh_optimizer = OPTIMIZER not in manifest["files"] or frozen.optimizer._target_ != before.optimizer._target_
    frozen.parent = escape(lineage | ({"fresh_optimizer": True} if fresh_optimizer else {}))
    if cfg.tracking.group is not None:  # for example the group of a sweep
        copy_value(cfg, "tracking.group", frozen)
        copy_value(cfg, "tracking.tags", frozen)
    copy_value(cfg, "tracking.name", frozen)
    frozen.accept_changes = cfg.accept_changes
    config = freeze(frozen)
    check_unused_overrides(config, overrides)
    for note in unused_overrides(config, overrides):
        logger.warning(note)
    _check_steps(config, state, reference_of(source))
    _check_weights(config, values["model"], overrides, parent)

    history = parent.metrics_of_steps(state.step)
    best = parent.checkpoints / "best"
    new_evaluation = _evaluates_otherwise(config, values)
    has_best = not new_evaluation and find_damage(best) is None and load_state(best).step <= state.step
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # left by a killed attempt to fork
    copied = [reference_of(source), *((best, reference_of(best)) if has_best else ())]
    for part in dict.fromkeys(each for each in copied if each is not None):
        _link_or_copy(part, folder.checkpoints / part.name)
    start = step_folder(folder.checkpoints, state.step)
    if fresh_optimizer or new_evaluation:
        _copy_with_fresh(source, start, optimizer=fresh_optimizer, evaluation=new_evaluation)
    else:
        _link_or_copy(source, start)
    folder.write_metrics(history)
    evaluations = {} if new_evaluation else parent.training_evaluations(state.step)
    for name, result in evaluations.items():
        folder.write_evaluation(name, result)
    folder.update_digests(kept_by_fork(parent.digests(), overrides.keys))
    folder.write_config(config)  # last, since with this file the folder is a run
    folder.update_status(
        state="running", iteration=state.iteration, step=state.step, best_reward=state.best_reward, error=None
    )
    return config


def _keep_validation(frozen: DictConfig, before: DictConfig, overrides: Overrides) -> None:
    """Keep the parent's validation problems if the fork has the same data: it would validate on problems trained on.

    Raises ConfigError if the command line asks for another share.
    """
    if not is_same_data(frozen.data, before.data) or frozen.data.validation_share == before.data.validation_share:
        return
    if overrides.names("data.validation_share"):
        raise ConfigError(
            f"data.validation_share={frozen.data.validation_share}: the parent was trained with "
            f"{before.data.validation_share} on the same data, so the splits must stay; start a new run for others"
        )
    frozen.data.validation_share = before.data.validation_share


def _evaluates_otherwise(config: Config, before: dict[str, Any]) -> bool:
    """Whether accuracies of the fork and its parent (`before`) differ in problems, prompts, decoding or grader."""
    data = before["data"]
    if not is_same_data(config.data, data):
        return True
    if any(config.data[key] != data[key] for key in ("validation_share", *PROMPT_KEYS)):
        return True
    own = to_dict(config)
    length, length_before = (
        each["eval"]["max_completion_length"] or each["grpo"]["max_completion_length"] for each in (own, before)
    )
    keys = ("accuracy", "max_problems", "samples", "temperature")
    return length != length_before or any(own["eval"][key] != before["eval"][key] for key in keys)


def _config_folders() -> list[Path]:
    """The folders that the config of this launch was composed from, in the order in which Hydra searches them."""
    if not HydraConfig.initialized():
        return [CONF_DIR]
    return [Path(each.path) for each in HydraConfig.get().runtime.config_sources if each.schema == "file"]


def _checkpoint(parent: RunFolder, choice: int | str | None) -> Path:
    """The checkpoint to start from: of a step, `best`, or the newest (None). Raises ConfigError."""
    if choice is None:
        checkpoint = latest_checkpoint(parent.checkpoints)
        if checkpoint is None:
            raise ConfigError(f"fork=true: {parent.path} has no checkpoint to start from yet")
        return checkpoint
    checkpoint = named_checkpoint(parent.checkpoints, str(choice), "fork_step")
    if checkpoint.name == "best":  # the checkpoint of the same step has the optimizer's states as well
        complete = step_folder(parent.checkpoints, load_state(checkpoint).step)
        if find_damage(complete) is None:
            return complete
    return checkpoint


def _check_weights(config: Config, before: dict[str, Any], overrides: Overrides, parent: RunFolder) -> None:
    """Raise ConfigError if the weights of the parent's checkpoint do not fit the model of the fork.

    model.name may be given on the command line, since the parent's model may have been moved to another folder.
    """
    model = to_dict(config)["model"]
    if model["name"] != before["name"] and "model.name" not in overrides.keys:
        raise ConfigError(
            f"model.name={model['name']}: a fork continues with the weights of its parent's model, {before['name']}; "
            "start a new run for another one"
        )
    if model["lora"] == before["lora"]:
        return
    if before["lora"] is None:
        way = arguments_in_shell("tuning=lora", path_override("model.name", parent.final_model))
    elif model["lora"] is not None:
        adapter = path_override("model.lora.init_from", parent.final_model)
        way = f"{arguments_in_shell('tuning=lora', adapter)}, with the rank and alpha of that"
    else:
        merged = arguments_in_shell(path_override("model.name", parent.path / "merged_model"))
        way = f"{merged} after: {grpo_command('merge', path_argument('run_dir', parent.path))}"
    raise ConfigError(f"the checkpoint does not fit a fork with another model.lora; start a new run with {way}")


def _check_steps(config: Config, state: TrainerState, reference: Path | None) -> None:
    grpo = config.grpo
    total = grpo.num_iterations * grpo.num_steps
    if total <= state.step:
        raise ConfigError(
            f"the fork would start at step {state.step} of {total}: nothing is left to do; "
            "set a larger grpo.num_steps, or an earlier fork_step"
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


def _copy_with_fresh(source: Path, target: Path, *, optimizer: bool, evaluation: bool) -> None:
    """Copy a checkpoint, or best/, as one whose optimizer has no state yet, or which was not evaluated yet."""
    temporary = target.with_name(f"{target.name}.tmp")
    _link_or_copy(source, temporary)
    (temporary / MANIFEST).unlink()
    if optimizer:
        (temporary / OPTIMIZER).unlink(missing_ok=True)
        save_file({}, temporary / OPTIMIZER)
    if evaluation:
        values = read_json(temporary / STATE) | {"best_accuracy": None, "evaluated_step": 0}
        (temporary / STATE).unlink()  # it may be a link to the parent's
        (temporary / STATE).write_text(json.dumps(values), encoding="utf-8")
    reference = reference_of(source)
    commit_checkpoint(temporary, target, None if reference is None else reference.name)


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
