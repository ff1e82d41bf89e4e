"""The run folder: all files that a run writes, including those needed to resume it."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo.config.errors import FileError, first_line
from grpo.config.migrations import EVALUATION_STEPS, REMOVED_WITHIN_2, VERSION, load_frozen, metrics_row, migrate
from grpo.config.reading import read_yaml
from grpo.config.schema import Config
from grpo.config.values import escape, to_dict
from grpo.runs.files import (
    check_record,
    commit_folder,
    discard,
    follow_umask,
    json_lines,
    no_link,
    read_json,
    read_lines,
    sync,
    write_atomic,
)

# The types of the values that are read from the small files.
Interval = tuple[float, float] | None
STATUS: dict[str, Any] = {"state": str, "step": int, "iteration": int, "total_steps": int, "saved_step": int}
STATUS |= {"seconds": float, "best_reward": float | None, "error": str | None, "overrides": list[str]}
EVALUATION: dict[str, Any] = {"split": str, "step": int, "n": int, "accuracy": float | None, "reward": float | None}
EVALUATION |= {"rewards": dict[str, float | None] | None, "problems": list[dict], "missing": int}
EVALUATION |= {"completions/mean_length": float | None, "completions/clipped_ratio": float | None}
EVALUATION |= {"grader": dict[str, Any], "samples": int, "temperature": float, "max_completion_length": int}
EVALUATION |= {"accuracy_interval": Interval, "set": str, "model": str}
EVALUATION |= {"graded": dict[str, dict[str, Any]], "by": dict[str, dict[str, dict[str, Any]]]}
EVALUATION |= {"pass@k": dict[str, dict[str, Any]], "maj@k": dict[str, dict[str, Any]]}
MEASURED: dict[str, Any] = {"accuracy": float | None, "share": float | None, "interval": Interval, "n": int}
PREFLIGHT: dict[str, Any] = {"prompts": int, "completions": int, "frac_reward_zero_std": float | None}
PREFLIGHT |= {"components": dict[str, dict[str, float | None]], "prompt_lengths": dict[str, float]}
PREFLIGHT |= {"completions/clipped_ratio": float, "warnings": list[str]}
PROBLEM: dict[str, Any] = {"correct": bool | None, "problem_id": str}
LAUNCH: dict[str, Any] = {"time": str, "from_step": int, "overrides": list[str], "changes": dict, "environment": dict}
LAUNCH |= {"flags": list[str]}
METRICS: dict[str, Any] = {"step": int, "iteration": int, "reward": float | None, "step_time": float | None}


# What a launch writes, and what a fork copies, before config.yaml, with which the folder becomes a run.
BEFORE_START = (".lock", ".hydra", "launch.log", "launches.jsonl", "launches.jsonl.tmp", "config.yaml.tmp")
COPIED_BY_FORK = ("checkpoints", "metrics", "eval", "digests.json")


class RunFolder:
    """The paths and small files of one run folder; docs/watching.md describes the layout."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The frozen config."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final_model(self) -> Path:
        """The folder of the trained model."""
        return self.path / "final_model"

    @property
    def metrics_file(self) -> Path:
        """The metrics rows."""
        return self.path / "metrics" / "metrics.jsonl"

    def started(self) -> bool:
        """Whether a run was ever started here."""
        return self.config_file.exists()

    def status(self) -> dict:
        """The content of status.json; `{}` where there is none."""
        file = self.path / "status.json"
        return read_json(file, STATUS) if file.exists() else {}

    def finished(self) -> bool:
        """Whether the run has taken its steps, up to the last one or its target, and written its model."""
        return self.status().get("state") == "finished"

    def saved_step(self) -> int:
        """The step of the newest checkpoint that was recorded, even if it no longer exists; 0 if there was none."""
        status = self.status()
        starts = [launch.get("from_step") for launch in self.launches()]
        saved = status["saved_step"] if "saved_step" in status else self._saved_step_of_version_0(status)
        return max(step for step in (0, saved, *starts) if isinstance(step, int))

    def _saved_step_of_version_0(self, status: dict[str, Any]) -> int:
        """The last saved step of a run of version 0, which did not record it.

        A checkpoint is saved when a run is stopped and every `checkpoint.every` steps.
        """
        step = status.get("step", 0)
        if status.get("state") in ("interrupted", "finished") or not self.started():
            return step
        every = self.frozen_config(complete=False).get("checkpoint", {}).get("every", 0)
        return step - step % every if every else 0

    def update_status(self, **changes: object) -> None:
        """Change some keys of status.json. The file is replaced atomically, so a reader never sees half a file."""
        write_atomic(self.path / "status.json", json.dumps(self.status() | changes, indent=2) + "\n")

    def write_config(self, config: Config) -> None:
        """Write the resolved config to config.yaml, which is never overwritten."""
        if self.started():
            raise FileExistsError(f"{self.config_file} is written once and exists already")
        values = {"version": VERSION, **to_dict(config)}
        write_atomic(self.config_file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def frozen_config(self, complete: bool = True) -> DictConfig:
        """The config that the run was started with, with the changes of later launches.

        complete: see load_frozen.
        """
        frozen = load_frozen(self.config_file, complete)
        for key, value in self.changes().items():
            if key in REMOVED_WITHIN_2:
                continue
            try:
                OmegaConf.update(frozen, key, escape(value), merge=False)
            except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
                raise FileError(f"{self.path / 'changes.yaml'}: {key}: {first_line(error)}") from error
        return frozen

    def changes(self) -> dict[str, Any]:
        """The changes by resumed launches, by dotted key; config.yaml itself is never overwritten."""
        file = self.path / "changes.yaml"
        return read_yaml(file, dict) if file.exists() else {}

    def record_changes(self, changes: dict[str, Any]) -> None:
        """Add the changes by a resumed launch to changes.yaml."""
        if changes:
            write_atomic(self.path / "changes.yaml", yaml.safe_dump(self.changes() | changes, allow_unicode=True))

    def record_launch(self, launch: dict[str, Any], begun: bool = False) -> None:
        """Add a line to launches.jsonl: the command line, the step it starts from, and the environment.

        begun: whether to replace the last line, which recorded the command line before the run started.
        """
        known = self.launches()
        write_atomic(self.path / "launches.jsonl", json_lines([*(known[:-1] if begun else known), launch]))

    def launches(self) -> list[dict[str, Any]]:
        """The launches of this run, in order; an incomplete last line is ignored."""
        return read_lines(self.path / "launches.jsonl", LAUNCH)

    def digests(self) -> dict[str, str]:
        """The digests of what the run depends on, by name (see training/digests.py); `{}` for an earlier version."""
        file = self.path / "digests.json"
        record = read_json(file) if file.exists() else {}
        check_record(record, dict.fromkeys(record, str), str(file))
        return record

    def update_digests(self, found: dict[str, str], accepted: Iterable[str] = ()) -> None:
        """Add digests to digests.json; those that it has already are kept, unless their names are in `accepted`."""
        record = found | self.digests() | {name: found[name] for name in accepted}
        write_atomic(self.path / "digests.json", json.dumps(record, indent=1) + "\n")

    def has_trained(self) -> bool:
        """Whether a launch reached its first step; its environment is recorded directly before that."""
        return any("environment" in launch for launch in self.launches())

    def first_overrides(self) -> list[str]:
        """The overrides of the first launch."""
        launches = self.launches()
        return launches[0].get("overrides", []) if launches else []

    def metrics(self, up_to_step: int | None = None) -> list[dict]:
        """The metrics rows, in order, up to a step; an incomplete last line is ignored. Raises FileError.

        Rows that an earlier version wrote have the names of this version.
        """
        return [metrics_row(row) for row in self._metrics_as_written(up_to_step)]

    def _metrics_as_written(self, up_to_step: int | None) -> list[dict]:
        rows = read_lines(self.metrics_file, METRICS)
        for number, row in enumerate(rows, start=1):
            where = f"{self.metrics_file}, line {number}"
            if "step" not in row:
                raise FileError(f'{where}: not a metrics row, which is an object with a "step"')
            for name, value in row.items():
                if not (isinstance(value, float | bool | NoneType) or name.startswith("digest/")):
                    check_record(row, {name: float}, where)
        return [row for row in rows if up_to_step is None or row["step"] <= up_to_step]

    def metrics_of_steps(self, steps: int) -> list[dict]:
        """The metrics rows of the first `steps` steps, as they are written.

        Raises FileError if one is missing or a line is damaged.
        """
        rows = self._metrics_as_written(steps)
        if len(rows) != steps or any(row["step"] != step for step, row in enumerate(rows, start=1)):
            raise FileError(
                f"{self.metrics_file} does not have one row for each of the {steps} steps of the checkpoint; restore "
                "it, or move the checkpoint away to repeat its steps"
            )
        return rows

    def truncate_metrics(self, step: int) -> list[dict]:
        """Remove the metrics rows after a step, since those steps will be repeated. Returns the rows that are kept.

        Raises FileError, without changing the file, if a row to keep is missing or a line is damaged.
        """
        rows = self.metrics_of_steps(step)
        self.write_metrics(rows)
        return rows

    def write_metrics(self, rows: Iterable[dict]) -> None:
        """Replace the metrics file by one with these rows."""
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.metrics_file, json_lines(rows))

    def append_metrics(self, row: dict) -> None:
        """Add a row for one step."""
        with open(self.metrics_file, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(row) + "\n")

    def sync_metrics(self) -> None:
        """Sync the metrics file to disk, so that its rows survive a power failure."""
        if self.metrics_file.exists():
            sync(self.metrics_file)

    def write_samples(self, step: int, rows: Iterable[dict]) -> None:
        """Write every completion of a step, one JSON object per line."""
        file = self.path / "samples" / f"step_{step:06d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json_lines(rows))

    def skipped_file(self, step: int) -> Path:
        """The tensors of a step whose update was not finite."""
        return self.path / "skipped" / f"step_{step:06d}.safetensors"

    def write_skipped(self, step: int, tensors: dict[str, Any], rows: Iterable[dict]) -> None:
        """Write the batch of a step whose update was not finite to skipped/step_000012.{safetensors,jsonl}."""
        from safetensors import SafetensorError  # here, since it imports torch
        from safetensors.torch import save_file

        file = self.skipped_file(step)
        file.parent.mkdir(exist_ok=True)
        discard(file)
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # its own exception for a failed write
            raise OSError(str(error)) from error
        follow_umask(file.parent)
        write_atomic(file.with_suffix(".jsonl"), json_lines(rows))

    @property
    def preflight_file(self) -> Path:
        """The results of the pre-flight."""
        return self.path / "preflight.json"

    def write_preflight(self, found: dict) -> None:
        """Write the results of the pre-flight to preflight.json."""
        write_atomic(self.preflight_file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def preflight(self) -> dict | None:
        """The results of the pre-flight; None if there was none."""
        if not self.preflight_file.exists():
            return None
        found = read_json(self.preflight_file, PREFLIGHT)
        where = str(self.preflight_file)
        check_record(found, {}, where, needed=PREFLIGHT)
        for each in found["components"].values():
            check_record(each, {}, where, needed=("mean", "nonzero"))
        check_record(found["prompt_lengths"], {}, where, needed=("min", "max"))
        return found

    def write_evaluation(self, name: str, result: dict) -> Path:
        """Write an evaluation to eval/<name>.json."""
        file = self.path / "eval" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps({"version": VERSION, **result}, indent=1, ensure_ascii=False) + "\n")
        return file

    def evaluation(self, name: str) -> dict | None:
        """The content of eval/<name>.json; None where there is none."""
        file = self.path / "eval" / f"{name}.json"
        return read_evaluation(file) if file.exists() else None

    def evaluations(self) -> dict[str, dict]:
        """The content of every eval/<name>.json by its name: `before` first, then by step, `after` last."""
        found = {file.stem: read_evaluation(file) for file in self.path.glob("eval/*.json")}
        place = {"before": 0, "after": 2}
        names = sorted(found, key=lambda name: (place.get(name, 1), found[name].get("step") or 0, name))
        return {name: found[name] for name in names}

    def training_evaluations(self, up_to_step: int | None = None) -> dict[str, dict]:
        """The evaluations from before and during training: `before` and `step_000123`."""
        found = {name: each for name, each in self.evaluations().items() if re.fullmatch(r"before|step_\d+", name)}
        return {name: each for name, each in found.items() if up_to_step is None or each.get("step", 0) <= up_to_step}

    def choosing_evaluations(self) -> list[dict]:
        """The evaluations by which a step or an arm is chosen, by step; of a run without validation problems on test.

        Those of a run of an earlier version are on test, too.
        """
        found = [each for name, each in self.evaluations().items() if re.fullmatch(r"before|step_\d+|after", name)]
        return [each for each in found if each["split"] == "validation"] or found

    def evaluation_at(self, step: int) -> dict | None:
        """The evaluation after a step by which the run is chosen; None if it was not evaluated there."""
        found = (self.evaluation(name) for name in (f"step_{step:06d}", "after"))
        return next((each for each in found if each is not None and each.get("step") == step), None)

    def accuracy_at(self, step: int) -> float | None:
        """The accuracy of `evaluation_at`."""
        return (self.evaluation_at(step) or {}).get("accuracy")

    def outcome(self) -> tuple[str, float] | None:
        """The name and value of the number by which runs are compared; None if there is none yet.

        It is the accuracy on validation problems after the last step, on test problems if there are none, or if that
        was not evaluated, the mean reward of the last step.
        """
        rows = self.metrics()
        if not rows:
            return None
        found = self.evaluation_at(rows[-1]["step"])
        if found is not None and found["accuracy"] is not None:
            return f"{found['split']} accuracy", found["accuracy"]
        reward = rows[-1]["reward"]
        return None if reward is None else ("reward", reward)

    def objective(self) -> float | None:
        """The number that a sweep maximizes."""
        found = self.outcome()
        return None if found is None else found[1]

    def save_final_model(self, *writers: Callable[[Path], object]) -> None:
        """Write final_model/ atomically. writers: functions that each write a part (model, tokenizer) to a folder."""
        temporary = self.path / "final_model.tmp"
        discard(temporary)
        for write in writers:
            write(temporary)
        commit_folder(temporary, self.final_model)


def read_evaluation(file: Path) -> dict[str, Any]:
    """The content of a file of eval/. Raises FileError if it is not one."""
    result: dict[str, Any] = {"split": "test"} | migrate(read_json(file, EVALUATION), file, EVALUATION_STEPS)
    if result["split"] not in ("train", "validation", "test"):
        raise FileError(f"{file}: split {result['split']!r} is not train, validation or test")
    groups = [result.get(name, {}) for name in ("graded", "pass@k", "maj@k")] + list(result.get("by", {}).values())
    for name, measured in ((name, each) for group in groups for name, each in group.items()):
        check_record(measured, MEASURED, f"{file}, {name}")
    for number, row in enumerate(result.get("problems", []), start=1):
        check_record(row, PROBLEM, f"{file}, problem {number}")
    accuracy = result.get("accuracy")
    if (accuracy is not None and (accuracy < 0 or accuracy > 1)) or result.get("n", 0) < 0:
        raise FileError(f"{file}: accuracy {accuracy} of {result.get('n')} problems is not possible")
    return result
