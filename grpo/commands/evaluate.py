"""Evaluate a model on the test problems: greedy decoding, or several samples per problem.

python -m grpo evaluate run_dir=outputs/...              the run's trained model; the result goes to its eval/ too
python -m grpo evaluate run_dir=outputs/... checkpoint=C the weights of a checkpoint: best, or one of its steps
python -m grpo evaluate run_dir=outputs/... model.name=M another model on the run's problems, such as the untrained one
python -m grpo evaluate model.name=M [data=...]          any hub name or local folder

baseline=FILE or baseline=MODEL   compare with an evaluation (eval/*.json), or with another model on the same problems
split=validation                  other problems than those of the test split: validation or train
eval.samples=8 eval.temperature=1 pass@k and maj@k from several samples per problem
eval.sets=[gsm8k,arithmetic]      several data sets, files of conf/data/, with the prompts of this config
eval.by=[level]                   accuracy by the value of a column
eval.max_problems=N               at most N problems of each set

Completions are kept in outputs/evaluations/, so the command can be stopped and repeated without sampling any twice.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from grpo.analysis.wrong_answers import CATEGORIES, why_wrong
from grpo.commands._common import ModelUnderTest, data_of_set, find_model, load_model_under_test, own_arguments
from grpo.config.checks import complete_sizes
from grpo.config.errors import ConfigError
from grpo.data.splits import is_same_data
from grpo.runs.console import evaluation_table
from grpo.runs.folder import RunFolder, read_evaluation

if TYPE_CHECKING:
    from grpo.data.problems import Problem

SPLITS = ("test", "validation", "train")
Results = Mapping[str, dict[str, Any]]  # by data set, the content of eval/*.json
Sets = dict[str, dict[str, Any] | None]  # name -> the group data of its config; None: that of the model's config


def main(arguments: list[str]) -> None:
    """Evaluate the model and print a table."""
    own, rest = own_arguments(arguments, ["baseline", "split"])
    split = own.get("split", "test")
    if split not in SPLITS:
        raise ConfigError(f"split={split}: must be one of {', '.join(SPLITS)}")
    subject = find_model(rest)
    _check_share(subject)
    sets = _sets(subject, split)
    baseline = own.get("baseline")
    others = {} if baseline is None else _baseline(baseline, subject, split, sets)
    results = _evaluate(subject, split, sets, others, str(baseline))
    console = Console(markup=False)
    console.print(f"model: {subject.model}", highlight=False, soft_wrap=True)
    for name, result in results.items():
        other = others.get(name)
        if other is not None:
            result["baseline"] = _comparison(other, result, str(baseline))
        shown = {"baseline": other, "model": result} if other is not None else {"model": result}
        console.print(evaluation_table(f"{name}, {split} problems", shown))
        for line in _why_wrong(result):
            console.print(line, highlight=False, soft_wrap=True)
        if other is not None:
            console.print(f"accuracy {result['baseline']['text']}", highlight=False, soft_wrap=True)
    _write(subject, results, console)


def _check_share(subject: ModelUnderTest) -> None:
    """Raise ConfigError if another data.validation_share would count problems as validation that a run trained on."""
    if subject.folder is None:
        return
    frozen = subject.folder.frozen_config().data
    share = subject.config.data["validation_share"]
    if is_same_data(frozen, subject.config.data) and share != frozen.validation_share:
        raise ConfigError(
            f"data.validation_share={share}: the run was trained with {frozen.validation_share} on the same data, so "
            "the splits must stay; remove it"
        )


def _sets(subject: ModelUnderTest, split: str) -> Sets:
    """The sets to evaluate on: those of eval.sets, or else the data of the config."""
    # Of a run folder only if the command line names them: they are composed, so they could name code.
    named = subject.folder is None or "eval.sets" in subject.changed
    if named and subject.config.eval.sets:
        return {name: data_of_set(name, subject, split) for name in subject.config.eval.sets}
    return {Path(str(subject.config.data.get("path") or "problems")).name: None}


def _why_wrong(result: dict[str, Any]) -> list[str]:
    """The categories of the wrong completions, with their numbers."""
    counts = Counter(category for row in result["problems"] if (category := why_wrong(row)) is not None)
    shown = [f"  {counts[name]:5}  {name}: {meaning}" for name, meaning in CATEGORIES.items() if counts[name]]
    return [f"{sum(counts.values())} wrong completions:", *shown] if shown else []


def _evaluate(
    subject: ModelUnderTest, split: str, sets: Sets, others: Results = MappingProxyType({}), baseline: str = ""
) -> Results:
    """The results of a model by data set. others: those of the baseline, which must have the same problems."""
    from grpo.training.completion_store import store_for  # imports torch
    from grpo.training.evaluation import evaluate, evaluated_problems, store_key
    from grpo.training.experiment import build_experiment

    results = {}
    experiments = {
        name: build_experiment(replace(subject.config, data=data)) for name, data in sets.items() if data is not None
    }
    for on in experiments.values():  # before a model is loaded
        evaluated_problems(on, split)
    experiment, engine, sampling, model = load_model_under_test(subject, with_problems=not experiments)
    with closing(engine):
        for name, other in others.items():  # before anything is sampled
            _check_problems(other, evaluated_problems(experiments.get(name, experiment), split), baseline)
        store = store_for(model, subject.config, store_key(experiment, sampling))
        for name in sets:
            on = experiments.get(name, experiment)
            with _progress(name) as progress:
                found = evaluate(engine, sampling, on, subject.step, split, store, progress)
            results[name] = {"model": subject.model, "set": name, **found}
    return results


def _baseline(baseline: str, subject: ModelUnderTest, split: str, sets: Sets) -> Results:
    """The evaluation that is compared with, by data set: that of a file, or of another model."""
    file = Path(baseline)
    if file.is_file():
        found = read_evaluation(file)
        _check_baseline(found, baseline, subject, split, sets)
        return dict.fromkeys(sets, found)
    if baseline.endswith(".json"):
        raise ConfigError(f"baseline={baseline}: there is no such file")
    if not baseline or RunFolder(baseline).started():
        run = baseline or "RUN"
        raise ConfigError(
            f"baseline={baseline}: give an evaluation, such as {run}/eval/after.json, or a model, such as "
            f"{run}/final_model"
        )
    model = replace(subject.config.model, name=baseline, lora=None)
    changed = (*subject.changed, "model.name")
    other = replace(subject, config=replace(subject.config, model=model), weights=None, step=0, changed=changed)
    return _evaluate(other, split, sets)


def _check_baseline(found: dict[str, Any], baseline: str, subject: ModelUnderTest, split: str, sets: Sets) -> None:
    """Raise ConfigError if a file cannot be compared with the evaluation that is asked for."""
    if len(sets) > 1:
        raise ConfigError(
            f"baseline={baseline} is of one set, and this evaluation of {', '.join(sets)}; give a model, or one set"
        )
    config = subject.config.eval
    asked = {"split": split, "samples": config.samples, "temperature": config.temperature, "grader": config.accuracy}
    length = config.max_completion_length or complete_sizes(subject.config).max_completion_length
    asked["max_completion_length"] = length
    for key, value in asked.items():
        if found.get(key, value) != value:
            raise ConfigError(f"baseline={baseline} has {key}={found[key]}, and this evaluation {value}; use the same")
    for key in ("accuracy", "n", "problems", "completions/mean_length", "rewards"):
        if found.get(key) is None:
            raise ConfigError(f"baseline={baseline} has no {key}; evaluate it again")


def _check_problems(found: dict[str, Any], problems: "Sequence[Problem]", baseline: str) -> None:
    """Raise ConfigError if a baseline and this evaluation share fewer than half of the problems of the smaller one."""
    from grpo.analysis.accuracy import pairing_keys  # imports numpy

    keys = pairing_keys(found)
    rows = [{"problem_id": each.id, "answer": each.answer, "prompt": each.question} for each in problems]
    known, asked = ({tuple(row.get(key) for key in keys) for row in part} for part in (found["problems"], rows))
    shared = len(known & asked)
    if shared == 0 or 2 * shared < min(len(known), len(asked)):
        raise ConfigError(
            f"baseline={baseline} has {shared or 'none'} of the {len(asked)} problems of this evaluation; evaluate it "
            "on the same data"
        )


def _comparison(other: dict[str, Any], result: dict[str, Any], name: str) -> dict[str, Any]:
    from grpo.analysis.summary import accuracy_difference, difference_text  # imports pandas

    difference = accuracy_difference(other, result)
    if difference is None:
        return {"name": name, "text": "is not compared: no problem is graded in both evaluations"}
    return {"name": name, "accuracy": other["accuracy"], **difference, "text": difference_text(difference)}


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A function that shows the number of problems done in a progress bar on a terminal."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(subject: ModelUnderTest, results: Results, console: Console) -> None:
    if subject.folder is None:
        return
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for name, result in results.items():
        stem = f"evaluate_{now}" if len(results) == 1 else f"evaluate_{now}_{name}"
        try:
            file = subject.folder.write_evaluation(stem, result)
        except OSError as error:  # for example in the folder of another user
            console.print(f"each problem's outcome could not be written: {error}", highlight=False, soft_wrap=True)
            return
        console.print(f"each problem's outcome: {file}", highlight=False, soft_wrap=True)
