"""The table of all metrics of a step, used by the charts, the W&B view, the tests and docs/metrics.md.

`python -m grpo.metric_table` prints it as Markdown. A metric that TRL has too carries TRL's name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

COMPONENT = "<component>"  # stands for the name of a reward component


@dataclass(frozen=True)
class Metric:
    """A column of metrics.jsonl."""

    name: str
    unit: str
    meaning: str
    taken_over: str  # the values that it is a mean, sum or extreme of
    section: str = ""  # section of the W&B view; empty: not shown there
    panel: str = ""  # panel in that section, also the title of the chart
    label: str = ""  # label of the curve, where a panel has several
    origin: str = ""  # `objective`: returned by the objective, and not part of every row


REWARD = "Reward"  # name of a section of the W&B view

# name | unit | meaning
#     taken over | section of the W&B view | panel, also the title of the chart | label of the curve | origin
TABLE = """
step | | completed steps, over all outer iterations
    the run
iteration | | outer iteration, from 1
    the run
reward | | weighted sum of the reward components
    mean over the completions | Reward | Reward | reward
rewards/<component>/mean | | one reward component; missing values do not count
    mean over the completions | Reward | Reward | <component>
rewards/<component>/std | | its standard deviation (ddof=1)
    all completions that have a value of it
reward_std | | standard deviation (ddof=1) of the combined reward
    all completions that have a reward
reward_group_std | | standard deviation (ddof=1) of the combined reward within a group
    mean over the groups | Reward | Spread of the reward within groups
frac_reward_zero_std | share of groups | groups without a signal: rewards all equal, or fewer than two are not missing
    the groups | Reward | Groups with equal rewards
completions/mean_length | tokens | length of a completion, with its end-of-sequence token
    mean over the completions | Lengths | Output length | mean
completions/min_length | tokens | the shortest completion
    the completions | Lengths | Output length | shortest
completions/max_length | tokens | the longest completion
    the completions | Lengths | Output length | longest
completions/clipped_ratio | share of completions | completions truncated at the length limit
    the completions | Lengths | Completions truncated at the length limit
loss | | the objective; at mu=1 its gradient counts, not its value
    the batch; mean over the updates | Loss and KL | Loss
kl | nats per token | KL divergence of the policy from the reference; only with beta above 0
    mean over counted tokens and updates | Loss and KL | KL divergence from the reference | | objective
entropy | nats per token | entropy of the policy's distribution at the sampling temperature
    mean over counted tokens and updates | Loss and KL | Entropy of the policy
grad_norm | L2 norm | gradient before clipping
    mean over the mu updates | Loss and KL | Gradient norm
weights_changed | share of weights | weights that the updates of the step changed; 0: the learning rate is rounded away
    at most 64 of each trained tensor
clip_ratio/low_mean | share of tokens | ratio below 1 - epsilon_low, negative advantage: no gradient
    mean over counted tokens and updates | Loss and KL | Clipped tokens | low | objective
clip_ratio/high_mean | share of tokens | ratio above 1 + epsilon_high, positive advantage: no gradient
    mean over counted tokens and updates | Loss and KL | Clipped tokens | high | objective
clip_ratio/region_mean | share of tokens | one or the other
    mean over counted tokens and updates | | | | objective
cispo_clip_ratio | share of tokens | ratio above cap, positive advantage: its weight is the cap
    mean over counted tokens and updates | Loss and KL | Clipped tokens | cap | objective
learning_rate | | of the step
    the step | Loss and KL | Learning rate
sampling/logp_difference/mean | nats per token | absolute difference of log-probabilities in sampling and training
    mean over counted tokens, before the first update | Loss and KL | Difference between sampling and training | mean
sampling/logp_difference/max | nats | the largest such difference
    the counted tokens, before the first update | Loss and KL | Difference between sampling and training | largest
sampling/importance_sampling_ratio/mean | | importance weight; only with objective.sampling_correction
    mean over counted tokens and updates | | | | objective
sampling/refilled_groups | groups | sampled instead of groups without a signal; only with sampling.refill
    the step
loss_scale | | factor of the loss in its backward pass; only in float16
    the step
num_tokens | tokens | prompt and completion tokens so far, each prompt once per completion
    the run
step_time | s | time of the step, saving excluded
    the step | Speed | Time of a step
timing_s/rollout | s | sampling
    the step | Speed | Parts of a step | rollout
timing_s/reward | s | scoring and advantages
    the step | Speed | Parts of a step | reward
timing_s/reference | s | the reference's pass
    the step | Speed | Parts of a step | reference
timing_s/update | s | gradients and optimizer
    the step | Speed | Parts of a step | update
timing_s/checkpoint | s | for which the save before this step held up training
    the step | Speed | Parts of a step | checkpoint
perf/tokens_per_s | tokens per s | completion tokens per second
    the step | Speed | Tokens per second
perf/peak_memory_gb | GB | largest memory so far
    the run | Speed | Peak memory
digest/completions | | SHA-256 of every sampled token, first 16 hexadecimal digits
    the completions
"""


def _parse(table: str) -> tuple[Metric, ...]:
    entries = table.strip().replace("\n    ", " | ").splitlines()
    return tuple(Metric(*(field.strip() for field in entry.split("|"))) for entry in entries)


METRICS = _parse(TABLE)


def of_components(names: Iterable[str]) -> list[Metric]:
    """The metrics; those with `<component>` in their name are repeated for each of the component names."""
    names = list(names)
    result = []
    for metric in METRICS:
        if COMPONENT not in metric.name:
            result.append(metric)
            continue
        for name in names:
            own = {"name": metric.name.replace(COMPONENT, name), "label": metric.label.replace(COMPONENT, name)}
            result.append(replace(metric, **own))
    return result


def component_ranges(config: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The (lowest, highest) value of each reward component that declares its `range`.

    If all components do, `reward` has the range of their weighted sum.
    """
    components = (config.get("reward") or {}).get("components") or {}
    ranges = {name: tuple(node["range"]) for name, node in components.items() if node.get("range")}
    if components and ranges.keys() == components.keys():
        weights = {name: node.get("weight", 1.0) for name, node in components.items()}
        ends = [sorted(weights[name] * end for end in ranges[name]) for name in components]
        ranges["reward"] = (sum(low for low, _ in ends), sum(high for _, high in ends))
    return ranges


def markdown() -> str:
    """The content of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "One row of `metrics/metrics.jsonl` for each step, the same columns in Weights & Biases. `<component>` stands",
        "for the name of a reward component. Printed by `python -m grpo.metric_table`.",
        "",
        "| name | unit | meaning | taken over |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{each.name}` | {each.unit} | {each.meaning} | {each.taken_over} |" for each in METRICS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
