"""Code shared by the commands: get a config from the command line or a run folder, and load its model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from grpo.config.checks import typed
from grpo.config.compose import apply_overrides, compose_config
from grpo.config.errors import ConfigError
from grpo.config.overrides import Overrides
from grpo.config.schema import PROMPT_KEYS, Config
from grpo.config.trust import check_trusted
from grpo.config.values import escape
from grpo.data.splits import is_same_data
from grpo.runs.files import check_contents
from grpo.runs.folder import RunFolder

if TYPE_CHECKING:  # they import torch
    from grpo.rollout.engine import RolloutEngine, Sampling
    from grpo.training.experiment import Experiment


@dataclass(frozen=True)
class ModelUnderTest:
    """The model that a command works on, and its config."""

    config: Config  # model.name is the model to load
    folder: RunFolder | None  # the run folder given as run_dir, if any
    weights: Path | None  # checkpoint whose weights replace those of the model; None: they are as loaded
    step: int  # number of steps for which the model was trained
    changed: tuple[str, ...] = ()  # keys and groups of the run's config that are replaced
    searched: tuple[str, ...] = ()  # the override hydra.searchpath of the command line, if it has one

    @property
    def model(self) -> str:
        """The name of the model, with its adapter or the checkpoint of its weights if it has one."""
        if self.weights is not None:
            return f"{self.config.model.name} with the weights of {self.weights}"
        lora = self.config.model.lora
        adapter = f" with the adapter {lora.init_from}" if lora is not None and lora.init_from is not None else ""
        return f"{self.config.model.name}{adapter}"


def own_arguments(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command's own `name=value` arguments, taken literally, from the overrides of the config."""
    own = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            own[name] = value
        else:
            overrides.append(argument)
    return own, overrides


def run_folder_of(overrides: Sequence[str]) -> RunFolder | None:
    """The run folder given as `run_dir=`; None if there is none. Raises ConfigError if it is not a run folder."""
    own, _ = own_arguments(overrides, ["run_dir"])
    return existing_run(own["run_dir"]) if "run_dir" in own else None


def existing_run(path: str) -> RunFolder:
    """The run folder at a path. Raises ConfigError if it is not a run folder."""
    folder = RunFolder(path.rstrip("/"))
    if not folder.started():
        raise ConfigError(f"run_dir={folder.path} is not a run folder (it has no config.yaml)")
    check_contents(folder.path)
    return folder


def composed_config(overrides: Overrides) -> DictConfig:
    """The config of conf/ with these overrides, and with the preset for the hardware of this machine."""
    from grpo.launch.preset import hardware_found  # imports torch

    return hardware_found(compose_config(overrides.lines), overrides, compose_config)


def changed_config(folder: RunFolder, overrides: Overrides) -> DictConfig:
    """The frozen config of a run with the given keys replaced. Raises ConfigError if it names untrusted code."""
    composed = composed_config(overrides)
    changed = apply_overrides(folder.frozen_config(), composed, overrides.without({"hydra.searchpath"}))
    check_trusted(changed, composed, folder.path)
    changed.accept_changes = composed.accept_changes
    return changed


def find_model(arguments: Sequence[str]) -> ModelUnderTest:
    """Find the config and the model for a command line.

    With run_dir: the run's frozen config, in which only the given keys are replaced, and the run's trained model; with
    checkpoint=best or checkpoint=STEP, the weights of that checkpoint; if model.name is given, that model with the
    run's problems. Without run_dir: the config composed from conf/.
    """
    folder = run_folder_of(arguments)
    own, rest = own_arguments(arguments, ["run_dir", "checkpoint"])
    overrides = Overrides(rest)
    searched = tuple(overrides.select({"hydra.searchpath"}).lines)
    asked = own.get("checkpoint")
    other_model = bool({"model", "model.name"} & set(overrides.keys))
    if asked is not None and (folder is None or other_model):
        raise ConfigError(f"checkpoint={asked} is for the model of a run: give run_dir=..., and no model.name=...")
    if folder is None:
        return ModelUnderTest(resolved(composed_config(overrides)), None, None, 0, searched=searched)
    changed = changed_config(folder, overrides)
    if other_model:
        if not overrides.names("model.lora"):
            changed.model.lora = None
        return ModelUnderTest(resolved(changed), folder, None, 0, tuple(overrides.keys), searched)
    # Only of a finished run: if steps were added to a run and are not completed yet, its final_model is older than its
    # checkpoints.
    if asked is None and folder.finished() and folder.final_model.exists():
        replaced = list(overrides.keys)
        if changed.model.get("lora") is None:
            changed.model.name = escape(str(folder.final_model))
            replaced.append("model.name")
        else:
            changed.model.lora.init_from = escape(str(folder.final_model))
        return ModelUnderTest(
            resolved(changed), folder, None, folder.status().get("step", 0), tuple(replaced), searched
        )
    from grpo.runs.checkpoint import latest_checkpoint, load_state, named_checkpoint  # imports torch

    weights = latest_checkpoint(folder.checkpoints) if asked is None else named_checkpoint(folder.checkpoints, asked)
    if weights is None:
        best = ", for its best weights checkpoint=best" if (folder.checkpoints / "best").is_dir() else ""
        raise ConfigError(f"{folder.path} holds no trained model yet; for the untrained one add model.name=...{best}")
    return ModelUnderTest(resolved(changed), folder, weights, load_state(weights).step, tuple(overrides.keys), searched)


def resolved(cfg: DictConfig) -> Config:
    """The config as dataclasses, with open hardware settings filled in and the device checked."""
    from grpo.model.hardware import resolve_hardware  # imports torch

    resolve_hardware(cfg)
    return typed(cfg)


def data_of_set(name: str, subject: ModelUnderTest, split: str) -> dict[str, Any]:
    """The group data with the problems of conf/data/<name>.yaml and the prompts of the subject's config.

    If it is the data of the subject's run, the same problems are validation problems. For split=test there are none.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ConfigError(f"eval.sets: {name} is not the name of a file in conf/data/")
    overrides = Overrides([*subject.searched, f"data={name}"])
    composed: Any = OmegaConf.to_container(composed_config(overrides).data, resolve=True)
    found = (
        {"validation_share": 0.0}
        | composed
        | {key: subject.config.data[key] for key in (*PROMPT_KEYS, "max_prompt_length")}
    )
    if split == "test":
        found["validation_share"] = 0.0
        return found
    trained_on = subject.config.data if subject.folder is None else subject.folder.frozen_config().data
    if is_same_data(found, trained_on):
        found["validation_share"] = trained_on["validation_share"]
    return found


class LoadedModel(NamedTuple):
    """A model with the parts that sample from it."""

    experiment: "Experiment"
    engine: "RolloutEngine"
    sampling: "Sampling"
    model: Any  # of transformers, in the compute dtype


def load_model_under_test(subject: ModelUnderTest, with_problems: bool = True) -> LoadedModel:
    """Build the experiment of the subject's config, and an engine that samples from its model as in training."""
    from grpo.runs.checkpoint import StoredTensors, load_weights
    from grpo.training.digests import check_digests, digests_of
    from grpo.training.experiment import build_experiment

    experiment = build_experiment(subject.config, with_problems)
    policy = experiment.load_policy()
    if subject.folder is not None:
        found = digests_of(experiment, subject.folder, policy)
        for name in ("adapter",) if with_problems else ("adapter", "problems", "prompts"):
            found.pop(name, None)  # the adapter is the trained one
        check_digests(subject.folder, found, subject.changed, subject.config.accept_changes)
    model = experiment.in_compute_dtype(policy)
    if subject.weights is not None:
        load_weights(StoredTensors(subject.weights / "model.safetensors"), model)
    return LoadedModel(experiment, experiment.build_engine(model), experiment.sampling(model), model)
