"""The model card of a trained model: README.md of final_model/, in the form of the Hugging Face hub."""

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from grpo.analysis.accuracy import accuracy_interval
from grpo.analysis.load import read_config
from grpo.analysis.summary import accuracy_difference, difference_text
from grpo.config.command_line import override
from grpo.config.hub import is_hub_name
from grpo.config.overrides import Overrides
from grpo.config.schema import LAUNCH_KEYS
from grpo.runs.folder import RunFolder

# In quotes, where it can have spaces, or without them; not a closing tag, and not the end of another path.
_QUOTED_PATH = re.compile(r"""(?<=['"])(?:file://)?[~/][^'"<\n]*/(?=[^'"<\n/]+['"])""")
_PATH = re.compile(r"(?:file://|(?<![\w.<:/~]))[~/][\w.@+-]*/(?:[\w.@+-]+/)*(?=[\w.@+-])")


def write_model_card(run: RunFolder, folder: Path) -> None:
    """Write README.md into the folder of a run's trained model."""
    (folder / "README.md").write_text(model_card(run), encoding="utf-8")


def _data_name(data: dict[str, Any]) -> str:
    return f"`{_without_folder(data.get('path') or data['_target_'])}` {data.get('name') or ''}".strip()


def model_card(run: RunFolder) -> str:
    """What the model was trained on and how, with its evaluations and the command that trains it again."""
    config = read_config(run.path)
    model, data, grpo = config["model"], config["data"], config["grpo"]
    adapter = model.get("lora") is not None
    front = {
        **({"base_model": model["name"]} if "/" in model["name"] and is_hub_name(model["name"]) else {}),
        "library_name": "peft" if adapter else "transformers",
        "tags": ["grpo", "reinforcement-learning"],
    }
    first = run.launches()[0] if run.launches() else {}
    environment = first.get("environment", {})
    digest = hashlib.sha256(run.config_file.read_bytes()).hexdigest()
    rewards = [f"{name} (`{each['_target_']}`, weight {each.get('weight', 1.0):g})" for name, each in _rewards(config)]
    planned = grpo["num_iterations"] * grpo["num_steps"]
    steps = run.status().get("step") or planned  # fewer if the run ended at its target
    parent = config.get("parent")
    rows = {
        **({"forked from": f"step {parent['step']} of another run, whose settings it keeps"} if parent else {}),
        "base model": f"`{_without_folder(model['name'])}`{', with LoRA' if adapter else ''}",
        "data": ", ".join(_data_name(each) for each in (data.get("parts") or {"": data}).values()),
        "rewards": "; ".join(rewards),
        "steps": f"{steps}, of {grpo['batch_size']} prompts with {grpo['num_generations']} completions of at most "
        f"{grpo['max_completion_length']} tokens",
        "learning rate, beta, seed": f"{config['optimizer'].get('lr')}, {grpo['beta']}, {config['seed']}",
        "config": f"sha256 {digest[:16]}",
        "software": ", ".join(
            f"{name} {environment[name]}" for name in ("torch", "transformers") if name in environment
        ),
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {config['name']}",
        "",
        "Trained with GRPO (group relative policy optimization).",
        "",
        "## Evaluation",
        "",
        *_evaluation(run),
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows.items()),
        "",
        *_how_to_repeat(first, run.changes(), is_fork=bool(parent)),
    ]
    if data.get("system_prompt"):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", data["system_prompt"])), default=0))
        lines += ["", "System prompt of training:", "", fence, data["system_prompt"].strip(), fence]
    return "\n".join(lines) + "\n"


def _without_folder(text: str) -> str:
    """The text with only the last part of each absolute path, since the folders of a machine concern nobody else."""
    return _PATH.sub("", _QUOTED_PATH.sub("", text))


def _how_to_repeat(first: dict[str, Any], changes: dict[str, Any], is_fork: bool) -> list[str]:
    """The command that trains the model again: that of the first launch, without what concerns one launch or machine.

    changes: later ones, by key.
    """
    if is_fork:
        return ["A fork continues from a checkpoint of another run, so no command repeats all of its training."]
    given = Overrides(first.get("overrides", []))
    kept = [*given.select({"hydra.searchpath"}), *given.of_experiment.without(LAUNCH_KEYS | changes.keys())]
    arguments = [*first.get("flags", []), *kept, *(override(key, value) for key, value in changes.items())]
    shown = [_without_folder(argument) for argument in arguments]
    note = ["Folders are named without their path.", ""] if shown != arguments else []
    return [*note, "```bash", shlex.join(["python", "launch.py", *shown]), "```"]


def _rewards(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(config["reward"]["components"].items())


def _evaluation(run: RunFolder) -> list[str]:
    steps = run.status().get("step", 0)
    found = {
        "test, before training": run.evaluation("before"),
        "validation, after training": run.evaluation_at(steps),
        "test, after training": run.evaluation("after"),
    }
    shown = {name: each for name, each in found.items() if each and each["accuracy"] is not None}
    shown = {name: each for name, each in shown.items() if name.startswith(each["split"])}
    if not shown:
        return ["Not evaluated."]
    lines = ["| problems | accuracy | 95 % interval | number |", "|---|---|---|---|"]
    for name, each in shown.items():
        low, high = accuracy_interval(each) or (0.0, 1.0)
        lines.append(f"| {name} | {each['accuracy']:.1%} | {low:.1%} to {high:.1%} | {each['n']} |")
    difference = accuracy_difference(found["test, before training"], found["test, after training"])
    decoding = "greedy decoding" if not next(iter(shown.values())).get("temperature") else "sampling"
    said = [f"Difference on the test problems: {difference_text(difference)}."] if difference else []
    return [*lines, "", " ".join([f"With {decoding}.", *said])]
