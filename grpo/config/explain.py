"""What to say of an error of Hydra or OmegaConf: what is wrong with the input, and the fix."""

import difflib
import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException

from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.paths import CONF_DIR, LAUNCH
from grpo.config.values import flatten

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
    "objective.epsilon": "objective.epsilon_low and objective.epsilon_high",
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


def explain(error: Exception) -> str:
    """One or two lines for the user: what is wrong with the input, and the fix."""
    cause: BaseException | None = error
    while cause is not None:  # Hydra and OmegaConf wrap what is raised while they work
        if isinstance(cause, ConfigError):
            return str(cause).strip()
        cause = cause.__cause__
    text = str(error).strip()
    if isinstance(error, MissingConfigException):
        missing = error.missing_cfg_file or ""
        if missing.startswith("hydra/"):
            return unknown_plugin(missing, error.options)
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
        reason = str(error.__cause__ or "").strip().splitlines()
        return f"{override.group(1)}: {reason[0] if reason else 'not a value that this key can have'}"
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
