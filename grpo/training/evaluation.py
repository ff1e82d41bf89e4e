"""Evaluation: completions of the validation or test problems, scored as in training and by the graders of `eval`."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from grpo.analysis.accuracy import majority_share, pass_at_k, share_interval
from grpo.batch import Completions
from grpo.config.errors import ConfigError
from grpo.counter_rng import group_keys
from grpo.data.problems import Problem
from grpo.rewards.lenient import final_answer, last_boxed
from grpo.rewards.math_boxed import plain_latex
from grpo.rewards.math_xml import extract_answer
from grpo.rewards.number import parse_number
from grpo.rewards.scoring import score
from grpo.rollout.engine import RolloutEngine, Sampling, sample_completions
from grpo.training.completion_store import CompletionStore, Ids, chunks, prompt_digests
from grpo.training.experiment import Experiment
from grpo.training.metrics import completion_rows, ended
from grpo.training.scored_completions import score_completions

Progress = Callable[[int, int], None]  # called with the number of problems that are done and that of all


def evaluate(
    engine: RolloutEngine,
    sampling: Sampling,
    experiment: Experiment,
    step: int,
    split: str = "test",
    store: CompletionStore | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a model on the problems of a split, with the settings of `eval`.

    sampling: the parameters of training; those of `evaluation_sampling` are used. step: number of steps that the model
    was trained for, stored in the result. store: where completions are taken from and kept. progress: called after
    each part of the problems.

    Returns the content of eval/*.json. Of single values: split; step; grader (eval.accuracy); samples (per problem);
    temperature; max_completion_length (tokens); n (number of problems with a value of accuracy) and missing (number of
    those without); accuracy (0 to 1, the mean over the n problems; None if n is 0) and accuracy_interval ([low, high],
    95 %); reward; completions/mean_length (tokens); completions/clipped_ratio (share truncated at the limit). rewards:
    mean of each component. graded: for each of eval.graders the mean and its interval. pass@k, maj@k: by k, for several
    samples. by: column -> value -> accuracy.
    problems: a row for each completion, those of `completion_rows` with `sample` (its number), `correct` (None where
    eval.accuracy gave no value), `graded` (by grader), `length` in tokens and `truncated`.
    """
    config = experiment.config.eval
    used = evaluation_sampling(experiment, sampling)
    problems = evaluated_problems(experiment, split)
    rows: list[list[dict[str, Any]]] = [[] for _ in problems]
    done = 0
    for places, completions in _completions(engine, used, experiment, problems, store):
        of_part = [problems[place] for place in places]
        for number, row in enumerate(_outcomes(experiment, of_part, completions, used.stop_ids, step)):
            rows[places[number // config.samples]].append({**row, "sample": number % config.samples})
        done += len(places)
        if progress is not None:
            progress(done, len(problems))
    return {"split": split, "step": step, **_summary(experiment, problems, rows)}


def evaluated_problems(experiment: Experiment, split: str) -> Sequence[Problem]:
    """The problems of a split that are evaluated, at most eval.max_problems. Raises ConfigError if there are none."""
    problems: list[Problem] = getattr(experiment.problems, split)[: experiment.config.eval.max_problems]
    if not problems:
        remedy = f"give data.path a folder with a {split}.jsonl"
        if split == "validation":
            share = experiment.config.data["validation_share"]
            remedy = f"with data.validation_share={share} it keeps none; choose a larger share"
        raise ConfigError(f"data has no {split} problems to evaluate on: {remedy}")
    return problems


def evaluation_sampling(experiment: Experiment, sampling: Sampling) -> Sampling:
    """The sampling parameters of an evaluation: those of training, with the temperature and length of `eval`."""
    config = experiment.config.eval
    length = config.max_completion_length or experiment.sizes.max_completion_length
    return replace(sampling, temperature=config.temperature, max_new_tokens=length, min_new_tokens=0)


def store_key(experiment: Experiment, sampling: Sampling) -> dict[str, Any]:
    """The parameters on which the completions of an evaluation depend, for `completion_store.store_for`."""
    return {**asdict(evaluation_sampling(experiment, sampling)), "samples": experiment.config.eval.samples}


def _completions(
    engine: RolloutEngine,
    sampling: Sampling,
    experiment: Experiment,
    problems: Sequence[Problem],
    store: CompletionStore | None,
) -> Iterator[tuple[list[int], Completions]]:
    """The completions of the problems, in parts: places in `problems`, and `eval.samples` completions of each."""
    samples = experiment.config.eval.samples
    sizes = experiment.sizes
    at_once = max(sizes.batch_size * sizes.num_generations, sizes.rollout_tokens // sampling.max_new_tokens)
    # Sorted by length, so that batches contain little padding.
    order = sorted(range(len(problems)), key=lambda place: len(problems[place].question))
    stored = store.read() if store is not None else {}
    for places in chunks(order, max(1, at_once // samples)):
        prompts = experiment.prompts(experiment.conversations([problems[place] for place in places]))
        names = list(zip(prompt_digests(prompts.ids, prompts.mask), places, strict=True))
        missing = [number for number, name in enumerate(names) if len(stored.get(name, [])) != samples]
        if missing:
            (lacking, _) = prompts.take(torch.tensor(missing, device=prompts.ids.device))
            keys = group_keys(experiment.config.seed, 0, np.array([places[i] for i in missing]), group_size=samples)
            completions = sample_completions(engine, lacking, sampling, group_size=samples, keys=keys)
            if completions.columns:  # of an engine of the user; they are not stored, so all are missing
                yield places, completions
                continue
            found = _by_problem(completions, [names[number] for number in missing])
            stored |= found
            if store is not None:
                store.append(found)
        yield places, _from_ids([ids for name in names for ids in stored[name]], samples, sampling.pad_id)


def _by_problem(completions: Completions, names: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Ids]:
    ids = [row[:length] for row, length in zip(completions.ids.tolist(), completions.lengths.tolist(), strict=True)]
    return {name: ids[i * len(ids) // len(names) :][: len(ids) // len(names)] for i, name in enumerate(names)}


def _from_ids(rows: Ids, samples: int, pad_id: int) -> Completions:
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id)  # (B, T)
    mask = pad_sequence([torch.ones_like(each) for each in tensors], batch_first=True)
    return Completions(ids, mask, mask, torch.arange(len(rows) // samples).repeat_interleave(samples))


def _outcomes(
    experiment: Experiment, problems: list[Problem], completions: Completions, stop_ids: tuple[int, ...], step: int
) -> list[dict[str, Any]]:
    # In parts of the size of a training batch, since reward.timeout_s is meant for that many completions.
    sizes = experiment.sizes
    parts = torch.arange(len(completions.ids)).split(sizes.batch_size * sizes.num_generations)
    return [row for part in parts for row in _scored(experiment, problems, completions.select(part), stop_ids, step)]


def _scored(
    experiment: Experiment, problems: list[Problem], completions: Completions, stop_ids: tuple[int, ...], step: int
) -> list[dict[str, Any]]:
    scored = score_completions(experiment, problems, completions, stop_ids, step)
    graders = [experiment.accuracy, *experiment.graders]
    grades = score(graders, scored.prompts, scored.messages, scored.columns, scored.trainer_state).components
    rows = completion_rows(problems, scored, completions.group)
    finished = ended(completions, stop_ids).tolist()
    outcomes = []
    for place, row in enumerate(rows):
        found = {name: _right(values[place].item()) for name, values in grades.items()}
        correct = found.pop(experiment.accuracy.name)
        length = int(scored.lengths[place])
        outcomes.append(
            {**row, "correct": correct, "graded": found, "length": length, "truncated": not finished[place]}
        )
    return outcomes


def _right(value: float) -> bool | None:
    return None if math.isnan(value) else bool(value)


def _summary(experiment: Experiment, problems: Sequence[Problem], rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The numbers of an evaluation. rows: for each problem, one for each sample."""
    config = experiment.config.eval
    flat = [row for of_problem in rows for row in of_problem]
    shares = [_mean([row["correct"] for row in of_problem]) for of_problem in rows]
    known = [share for share in shares if share is not None]
    graded = {}
    for name in (grader.name for grader in experiment.graders):
        values = [_mean([row["graded"][name] for row in of_problem]) for of_problem in rows]
        present = [value for value in values if value is not None]
        graded[name] = {"accuracy": _mean(present), "interval": share_interval(present)}
    result = {
        "grader": config.accuracy,
        "samples": config.samples,
        "temperature": config.temperature,
        "max_completion_length": config.max_completion_length or experiment.sizes.max_completion_length,
        "n": len(known),
        "missing": len(shares) - len(known),
        "accuracy": _mean(known),
        "accuracy_interval": share_interval(known),
        "graded": graded,
        "reward": _mean([row["reward"] for row in flat]),
        "rewards": {c.name: _mean([row[f"rewards/{c.name}"] for row in flat]) for c in experiment.components},
        "completions/mean_length": _mean([row["length"] for row in flat]),
        "completions/clipped_ratio": _mean([row["truncated"] for row in flat]),
    }
    if config.samples > 1:
        result |= _of_several(rows, config.samples, VOTES.get(config.accuracy["_target_"], _any_answer))
    if config.by:
        result["by"] = {column: _by_value(problems, shares, column) for column in config.by}
    return result | {"problems": flat}


def _of_several(
    rows: list[list[dict[str, Any]]], samples: int, vote: Callable[[str], str | Fraction | None]
) -> dict[str, Any]:
    """pass@k for k = 1, 2, 4, ... and the number of samples, and maj@k of all samples; over the graded problems.

    vote: the answer of a completion, None if it has none.
    """
    graded = [of_problem for of_problem in rows if all(row["correct"] is not None for row in of_problem)]
    ks = sorted({*(2**power for power in range(samples.bit_length()) if 2**power <= samples), samples})
    passed = {k: [pass_at_k(sum(r["correct"] for r in each), samples, k) for each in graded] for k in ks}
    majority = [
        majority_share([vote(row["completion"]) for row in each], [row["correct"] for row in each]) for each in graded
    ]
    return {
        "pass@k": {
            str(k): {"share": _mean(values), "interval": share_interval(values)} for k, values in passed.items()
        },
        "maj@k": {str(samples): {"share": _mean(majority), "interval": share_interval(majority)}},
    }


def _tagged_answer(completion: str) -> str | Fraction | None:
    """What the answer block of a completion states: a number, or else its text; None without a block."""
    block = extract_answer(completion)
    if not block:
        return None
    value = parse_number(block)
    return block if value is None else value


def _boxed_answer(completion: str) -> str | Fraction | None:
    """What the last box of a completion states: a number, or else its formula; None without a box."""
    boxed = last_boxed(completion)
    if not boxed:
        return None
    value = parse_number(boxed)
    return plain_latex(boxed) if value is None else value


def _any_answer(completion: str) -> str | Fraction | None:
    """What the answer block states, or without an answer in one what the completion ends with: for other graders."""
    tagged = _tagged_answer(completion)
    return tagged if tagged is not None else final_answer(completion)


# How the graders of the suite read an answer.
VOTES: dict[str, Callable[[str], str | Fraction | None]] = {
    "grpo.rewards.math_xml.accuracy": _tagged_answer,
    "grpo.rewards.math_xml.strict": _tagged_answer,
    "grpo.rewards.lenient.lenient": final_answer,
    "grpo.rewards.math_boxed.accuracy": _boxed_answer,
    "grpo.rewards.math_verify.accuracy": _boxed_answer,
}


def _by_value(problems: Sequence[Problem], shares: list[float | None], column: str) -> dict[str, Any]:
    """Accuracy by the value of a column, with its number of problems and interval."""
    groups: dict[str, list[float]] = {}
    for problem, share in zip(problems, shares, strict=True):
        if share is not None:
            groups.setdefault(str(problem.columns.get(column)), []).append(share)
    return {
        value: {"n": len(each), "accuracy": _mean(each), "interval": share_interval(each)}
        for value, each in sorted(groups.items())
    }


def _mean(values: Sequence[float | bool | None]) -> float | None:
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else None
