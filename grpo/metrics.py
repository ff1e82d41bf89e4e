"""The one table of what a step measures: read by the charts, the W&B view, the tests, and docs/metrics.md.

`python -m grpo.metrics` prints it as Markdown. Names are TRL's where it has one.
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
    taken_over: str  # what it is a mean, sum or extreme of
    section: str = ""  # of the W&B view; empty: not shown there
    panel: str = ""  # in that section, and the title of its chart
    label: str = ""  # of its curve, in a panel of several


REWARD, LENGTHS, LOSS, SPEED = "Reward", "Lengths", "Loss and KL", "Speed"
TOKENS = "mean over the tokens that count, and over the mu updates"
COMPLETIONS = "mean over the completions"

METRICS = (
    Metric("step", "", "completed steps, over all outer iterations", "the run"),
    Metric("iteration", "", "outer iteration, from 1", "the run"),
    Metric("reward", "", "weighted sum of the reward components", COMPLETIONS, REWARD, "Reward", "combined"),
    Metric(
        f"rewards/{COMPONENT}/mean",
        "",
        "one reward component; missing values do not count",
        COMPLETIONS,
        REWARD,
        "Reward",
        COMPONENT,
    ),
    Metric(
        f"rewards/{COMPONENT}/std", "", "its standard deviation (ddof=1)", "all completions that have a value of it"
    ),
    Metric(
        "reward_std",
        "",
        "standard deviation (ddof=1) of the combined reward within a group",
        "mean over the groups",
        REWARD,
        "Spread of the reward within groups",
    ),
    Metric(
        "frac_reward_zero_std",
        "share of groups",
        "groups whose rewards are all equal, which carry no signal",
        "the groups",
        REWARD,
        "Groups with equal rewards",
    ),
    Metric(
        "completions/mean_length",
        "tokens",
        "length of a completion, its end-of-sequence token included",
        COMPLETIONS,
        LENGTHS,
        "Output length",
        "mean",
    ),
    Metric(
        "completions/min_length",
        "tokens",
        "the shortest completion",
        "the completions",
        LENGTHS,
        "Output length",
        "shortest",
    ),
    Metric(
        "completions/max_length",
        "tokens",
        "the longest completion",
        "the completions",
        LENGTHS,
        "Output length",
        "longest",
    ),
    Metric(
        "completions/clipped_ratio",
        "share of completions",
        "completions truncated at the length limit",
        "the completions",
        LENGTHS,
        "Completions truncated at the length limit",
    ),
    Metric(
        "loss",
        "",
        "the objective; at mu=1 its value says little, its gradient is what counts",
        "the batch; mean over the mu updates",
        LOSS,
        "Loss",
    ),
    Metric(
        "kl",
        "nats per token",
        "KL divergence of the policy from the reference; only with beta above 0",
        TOKENS,
        LOSS,
        "KL divergence from the reference",
    ),
    Metric(
        "entropy",
        "nats per token",
        "entropy of the policy's distribution at the sampling temperature",
        TOKENS,
        LOSS,
        "Entropy of the policy",
    ),
    Metric("grad_norm", "L2 norm", "gradient before clipping", "mean over the mu updates", LOSS, "Gradient norm"),
    Metric(
        "clip_ratio/low_mean",
        "share of tokens",
        "probability ratio below 1 - epsilon_low with a negative advantage: no gradient",
        TOKENS,
        LOSS,
        "Clipped tokens",
        "low",
    ),
    Metric(
        "clip_ratio/high_mean",
        "share of tokens",
        "probability ratio above 1 + epsilon_high with a positive advantage: no gradient",
        TOKENS,
        LOSS,
        "Clipped tokens",
        "high",
    ),
    Metric("clip_ratio/region_mean", "share of tokens", "one or the other", TOKENS),
    Metric("learning_rate", "", "of the step", "the step", LOSS, "Learning rate"),
    Metric(
        "sampling/logp_difference/mean",
        "nats per token",
        "difference between the log-probabilities of sampling and of training, absolute",
        "mean over the tokens that count, before the first update",
        LOSS,
        "Difference between sampling and training",
        "mean",
    ),
    Metric(
        "sampling/logp_difference/max",
        "nats",
        "the largest such difference",
        "the tokens that count, before the first update",
        LOSS,
        "Difference between sampling and training",
        "largest",
    ),
    Metric("loss_scale", "", "factor of the loss in its backward pass; only in float16", "the step"),
    Metric("num_tokens", "tokens", "prompt and completion tokens so far, each prompt once per completion", "the run"),
    Metric("step_time", "s", "time of the step, saving excluded", "the step", SPEED, "Time of a step"),
    Metric("timing_s/rollout", "s", "sampling", "the step", SPEED, "Parts of a step", "rollout"),
    Metric("timing_s/reward", "s", "scoring and advantages", "the step", SPEED, "Parts of a step", "reward"),
    Metric("timing_s/reference", "s", "the reference's pass", "the step", SPEED, "Parts of a step", "reference"),
    Metric("timing_s/update", "s", "gradients and optimizer", "the step", SPEED, "Parts of a step", "update"),
    Metric(
        "timing_s/checkpoint",
        "s",
        "for which the save before this step held up training",
        "the step",
        SPEED,
        "Parts of a step",
        "checkpoint",
    ),
    Metric("perf/tokens_per_s", "tokens per s", "completion tokens per second", "the step", SPEED, "Tokens per second"),
    Metric("perf/peak_memory_gb", "GB", "largest memory so far", "the run", SPEED, "Peak memory"),
    Metric("digest/completions", "", "SHA-256 of every sampled token, first 16 hexadecimal digits", "the completions"),
)


def of_components(names: Iterable[str]) -> list[Metric]:
    """The table with a line for each reward component of these names."""
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
    """The lowest and highest value of each reward component that declares its `range`; `reward`: of their sum."""
    components = (config.get("reward") or {}).get("components") or {}
    ranges = {name: tuple(node["range"]) for name, node in components.items() if node.get("range")}
    if components and ranges.keys() == components.keys():
        weights = {name: node.get("weight", 1.0) for name, node in components.items()}
        ends = [sorted(weights[name] * end for end in ranges[name]) for name in components]
        ranges["reward"] = (sum(low for low, _ in ends), sum(high for _, high in ends))
    return ranges


def markdown() -> str:
    """The table as docs/metrics.md has it."""
    lines = [
        "# Metrics",
        "",
        "One row of `metrics/metrics.jsonl` for each step, the same columns in Weights & Biases. `<component>` stands",
        "for the name of a reward component. Printed by `python -m grpo.metrics`.",
        "",
        "| name | unit | meaning | taken over |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{each.name}` | {each.unit} | {each.meaning} | {each.taken_over} |" for each in METRICS]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
