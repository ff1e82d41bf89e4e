"""The pre-flight: samples and scores a few groups before the first step, to see whether they carry a signal."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from grpo.config.values import to_dict
from grpo.counter_rng import group_keys
from grpo.data.sampler import PromptSampler
from grpo.metric_table import component_ranges
from grpo.rollout.engine import RolloutEngine, Sampling, sample_completions
from grpo.training.experiment import Experiment
from grpo.training.metrics import completion_metrics, reward_metrics
from grpo.training.scored_completions import score_completions

METRICS = ("reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio")
MOST_GROUPS = 8
TRUNCATED_OFTEN = 0.25  # share of truncated completions at or above which there is a warning
MOSTLY_EQUAL = 0.75  # share of groups with equal rewards at or above which there is a warning


def preflight(
    engine: RolloutEngine, sampling: Sampling, sampler: PromptSampler, experiment: Experiment
) -> dict[str, Any]:
    """Sample and score completions of at most `MOST_GROUPS` problems of the first step, before training.

    Returns the content of preflight.json: prompts and completions (their numbers), components (for each the share of
    completions where it is not 0, its mean, the share where it gave no value, and the highest value of its declared
    range, None if it has none), reward, frac_reward_zero_std, completions/mean_length, completions/clipped_ratio,
    max_completion_length, prompt_lengths of all training problems, warnings, seconds.
    """
    sizes = experiment.sizes
    started = time.perf_counter()
    sampled = sampler.take(step=1, count=min(sizes.batch_size, MOST_GROUPS))
    prompts = experiment.prompts(experiment.conversations(sampled.problems))
    # The noise is that of step 0, so that these are not the completions of step 1.
    keys = group_keys(experiment.config.seed, 0, sampled.slots, sizes.num_generations)
    completions = sample_completions(engine, prompts, sampling, group_size=sizes.num_generations, keys=keys)
    scored = score_completions(experiment, sampled.problems, completions, sampling.stop_ids, step=0)
    row = reward_metrics(scored, sizes.num_generations) | completion_metrics(completions, sampling.stop_ids)
    lengths = experiment.prompt_lengths
    ranges = component_ranges(to_dict(experiment.config))
    highest = {name: high for name, (_, high) in ranges.items()}
    found = {
        "prompts": len(sampled.problems),
        "completions": len(scored.texts),
        "components": {
            name: _component(values) | {"highest": highest.get(name)}
            for name, values in scored.rewards.components.items()
        },
        **{name: row[name] for name in METRICS},
        "max_completion_length": sizes.max_completion_length,
        "prompt_lengths": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
    }
    return found | {"warnings": warnings(found), "seconds": time.perf_counter() - started}


def warnings(found: dict[str, Any]) -> list[str]:
    """Warnings about what may prevent learning, each with a fix."""
    messages = []
    for name, component in found["components"].items():
        if component["missing"] == 1.0:
            messages.append(f"{name} gave no value for any completion: does its function know these problems?")
        elif component["nonzero"] == 0.0 and component.get("highest") != 0.0:  # for a penalty, 0 is best
            messages.append(
                f"{name} is 0 for all {found['completions']} completions, so there is no signal for it: show solved "
                "problems (data.examples), describe the task in data.system_prompt, or use a larger model.name or "
                "easier problems"
            )
    if found["frac_reward_zero_std"] >= MOSTLY_EQUAL:
        messages.append(
            f"{found['frac_reward_zero_std']:.0%} of the groups have equal rewards, which carry no signal: "
            "use problems that the model solves sometimes, a larger grpo.num_generations, or a reward with values "
            "in between"
        )
    limit = found["max_completion_length"]
    if found["completions/clipped_ratio"] >= TRUNCATED_OFTEN:
        messages.append(
            f"{found['completions/clipped_ratio']:.0%} of the completions are truncated at {limit} tokens: "
            f"set grpo.max_completion_length={2 * limit}, or ask for shorter answers"
        )
    return messages


def lines(found: Mapping[str, Any]) -> list[str]:
    """The lines for the console."""
    result = [
        f"pre-flight: {found['prompts']} problem{'s' * (found['prompts'] != 1)}, {found['completions']} completions in "
        f"{found['seconds']:.1f} s "
        "(preflight=false skips it)"
    ]
    for name, component in found["components"].items():
        mean = "none" if component["mean"] is None else f"{component['mean']:.2f}"
        missing = f", no value for {component['missing']:.0%}" if component["missing"] else ""
        result.append(f"  {name:<14} mean {mean}, nonzero in {component['nonzero']:.0%}{missing}")
    prompt = found["prompt_lengths"]
    result += [
        f"  {'groups':<14} {found['frac_reward_zero_std']:.0%} with equal rewards",
        f"  {'completions':<14} {found['completions/mean_length']:.0f} tokens, "
        f"{found['completions/clipped_ratio']:.0%} truncated at {found['max_completion_length']}",
        f"  {'prompts':<14} {prompt['min']} to {prompt['max']} tokens, median {prompt['median']:.0f}",
    ]
    return result + [f"warning: {text}" for text in found["warnings"]]


def _component(values: torch.Tensor) -> dict[str, float | None]:
    present = values[~torch.isnan(values)]
    return {
        "nonzero": (present != 0).float().sum().item() / len(values),
        "mean": present.mean().item() if len(present) else None,
        "missing": 1.0 - len(present) / len(values),
    }
