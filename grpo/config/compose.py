"""Composing conf/ outside a launch, putting command lines on top of frozen configs, and wording the errors."""

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.overrides import Overrides
from grpo.config.schema import CONF_DIR, LAUNCH, LAUNCH_KEYS, ConfigError, copy_value, flatten

# Names that people bring from other trainers, and what they are called here.
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "kl_coef": "grpo.beta",
    "kl_beta": "grpo.beta",
    "per_device_train_batch_size": "grpo.batch_size",
    "max_steps": "grpo.num_steps",
    "max_new_tokens": "grpo.max_completion_length",
    "clip_range": "grpo.epsilon",
    "clip_eps": "grpo.epsilon",
    "temperature": "rollout.temperature",
    "dataset": "data",
    "bf16": "hardware.compute_dtype",
    "gradient_checkpointing": "hardware.activation_checkpointing",
    "autocast": "hardware.compute_dtype",
    "fp16": "hardware.compute_dtype",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.target_modules",
    "use_peft": "tuning",
    "micro_batch_size": "hardware.micro_batch_tokens",
    "gradient_accumulation_steps": "hardware.micro_batch_tokens",
}

EXTRA_PLUGINS = ("joblib", "optuna", "ray", "submitit_local", "submitit_slurm")  # of the extra [sweeps]


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """conf/config.yaml with these overrides, as `python launch.py` would compose it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))


def apply_overrides(frozen: DictConfig, composed: DictConfig, overrides: Overrides) -> DictConfig:
    """A frozen config with exactly what these overrides name replaced by its value in `composed`.

    A group (hardware=cpu) replaces that part whole. Raises ConfigError for an override that names no part, such as
    an experiment: it would silently change many.
    """
    result = frozen.copy()
    for key, line in zip(overrides.dotted_keys, overrides, strict=True):
        if key in LAUNCH_KEYS:
            continue
        if OmegaConf.select(composed, key, default=None) is None and key not in flatten(composed):
            raise ConfigError(f"{line}: cannot be applied to an existing run folder; name the keys themselves")
        copy_value(composed, key, result)
    return result


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command as this process's own, and return its exit code as `report_errors` does."""
    # Retries while the network is away would bury the one line that says so; read when huggingface_hub is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # What Apple's GPU lacks is done by the processor instead of failing; read when torch is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # Its own signal, USR2, would end a job of a sweep before it has saved; read when submitit is imported.
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of kernels not used here
    # A user's reward functions are found from where the command is given; last, so that nothing there can stand in
    # for a library's module.
    sys.path.append(os.getcwd())
    return report_errors(command)


def report_errors(command: Callable[[], int | None]) -> int:
    """Run a command. Returns what it returns (None: 0), 2 after bad input, or 1 after a failure, each with a line."""
    try:
        return command() or 0
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the run handles signals itself
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "Config group override must be" in str(error):  # Hydra's ValueError for `data=null`
            print("error: a config group cannot be null; choose one of its files", file=sys.stderr)
            return 2
        if "Unexpected type for root: NoneType" in str(error):  # its AssertionError for a key below a null one
            print(
                "error: a key below one that is null cannot be set; for model.lora.* add tuning=lora", file=sys.stderr
            )
            return 2
        if not getattr(error, "logged", False):  # what fails within a run is in its launch.log
            traceback.print_exc()
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def explain(error: Exception) -> str:
    """One or two lines for the user: what is wrong with the input, and the mend."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra and OmegaConf wrap what is raised while they work
        if isinstance(cause, ConfigError):
            return str(cause).strip()
        cause = cause.__cause__
    text = str(error).strip()
    if (getattr(error, "missing_cfg_file", None) or "").startswith("hydra/"):
        return unknown_plugin(error.missing_cfg_file, error.options)
    key = re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text)
    full_key = re.search(r"full_key: (\S+)", text)
    if key:
        return unknown_key(key.group(1) or (full_key.group(1) if full_key else key.group(2)))
    if full_key and re.search(r"Key '[^']+' not in '", text):
        return unknown_key(full_key.group(1))
    choice = re.search(r"Could not find '([^']+)/([^'/]+)'", text) or re.search(
        r"In '[^']*': Could not find '([^']+)/([^']+)'", text
    )
    if choice:
        return unknown_choice(*choice.groups())
    override = re.search(r"Error merging override (\S*)", text)
    if override:
        cause = str(error.__cause__ or "").strip().splitlines()
        return f"{override.group(1)}: {cause[0] if cause else 'not a value that this key can have'}"
    ambiguous = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if ambiguous:
        return f"{ambiguous.group(1)} names several values: for one run of each add -m, for a list write key=[a,b]"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])


def unknown_key(key: str) -> str:
    """What to say of a key that the config does not have: its name here, or the nearest real ones."""
    bare = key.lstrip("+~")
    other = OTHER_NAMES.get(bare) or OTHER_NAMES.get(bare.rsplit(".", 1)[-1])
    if other and other != bare:
        return f"there is no key '{bare}'; here it is called {other}"
    known = sorted(flatten(compose_config([])))
    groups = sorted(p.name for p in CONF_DIR.iterdir() if p.is_dir())
    near = difflib.get_close_matches(bare, known + groups, n=3, cutoff=0.6)
    last_part = bare.rsplit(".", 1)[-1]
    near += [k for k in known if k.rsplit(".", 1)[-1] == last_part and k not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else f"; `{' '.join(LAUNCH)} --cfg job` prints every key"
    return f"there is no key '{bare}'{hint}"


def unknown_plugin(path: str, options: Sequence[str] | None) -> str:
    """What to say of a choice such as hydra/launcher/ray that neither Hydra nor a plugin has."""
    group, _, choice = path.rpartition("/")
    if choice in EXTRA_PLUGINS:
        return f"{group}={choice} needs: pip install -e '.[sweeps]'"
    near = difflib.get_close_matches(choice, options or (), n=1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"there is no {group}={choice}; choose one of {', '.join(options or ())}.{hint}"


def unknown_choice(group: str, choice: str) -> str:
    """What to say of a choice that a config group does not have."""
    group, _, rest = group.partition("/")
    choice = f"{rest}/{choice}" if rest else choice
    if "/" in choice and group in ("model", "data"):
        key = {"model": "model.name", "data": "data.path"}[group]
        return f"{group}= chooses a file of conf/{group}/; for a hub name or a folder give {key}={choice}"
    choices = sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))
    near = difflib.get_close_matches(choice, choices, n=1)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return f"there is no {group}={choice}; choose one of {', '.join(choices)}.{hint}"
