"""Statistics of an evaluation: intervals, pass@k, maj@k, and the comparison of two models on the same problems."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import stdtrit  # the t distribution's quantile; scipy.stats takes a second to import


def pairing_keys(*evaluations: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The keys of a row of eval/*.json that identify its problem in all of these evaluations.

    The id alone does not, since ids may be line numbers, which stand for other problems in another data file.
    Evaluations of version 0 and 1 do not have the question.
    """
    rows = [row for each in evaluations for row in (each or {}).get("problems") or []]
    has_prompts = all(row.get("prompt") is not None for row in rows)
    return ("problem_id", "answer", "prompt") if has_prompts else ("problem_id", "answer")


def wilson_interval(accuracy: float | None, n: int | None) -> list[float] | None:
    """The 95 % Wilson score interval [low, high] of an accuracy (0 to 1) measured on `n` problems; None without `n`.

    Unlike the normal approximation it stays within 0 and 1, and is accurate for few problems and for accuracies near 0
    or 1 (Wilson, "Probable inference", 1927).
    """
    if not n or accuracy is None or not math.isfinite(accuracy):
        return None
    z = NormalDist().inv_cdf(0.975)
    center = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return [max(0.0, center - half), min(1.0, center + half)]


def accuracy_interval(record: Mapping[str, Any]) -> list[float] | None:
    """The 95 % interval of the accuracy of an evaluation (content of eval/*.json); of earlier versions Wilson's."""
    return record.get("accuracy_interval") or wilson_interval(record.get("accuracy"), record.get("n"))


def share_interval(shares: Sequence[float]) -> list[float] | None:
    """The 95 % interval [low, high] of the mean of one share (0 to 1) per problem, such as right samples or pass@k.

    The problems are the random sample. If all shares are 0 or 1 it is the Wilson interval. Else it is the t interval
    with one more problem of share 0 and one of share 1, since it would be too narrow if most shares are equal; its
    centre stays the observed mean, and it is cut at 0 and 1. None without shares.
    """
    values = np.asarray(shares, dtype=float)
    n = len(values)
    if n == 0:
        return None
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(mean, n)
    wider = np.append(values, (0.0, 1.0))
    half = float(stdtrit(n + 1, 0.975) * wider.std(ddof=1) / math.sqrt(n + 2))
    return [max(0.0, mean - half), min(1.0, mean + half)]


def pass_at_k(right: int, samples: int, k: int) -> float:
    """The probability that at least one of k samples is right, estimated from `right` of `samples` without bias.

    1 - C(samples - right, k) / C(samples, k): Chen et al., "Evaluating Large Language Models Trained on Code", 2021,
    equation 1. 1 <= k <= samples.
    """
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_share(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """Whether the most frequent answer of a problem's samples is right: 1 or 0; a tie counts the share of its answers.

    answers: what each sample answered, None for no answer, which does not vote. right: whether each sample is right.
    (Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", 2022.)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    verdicts: dict[Hashable, bool] = {}
    for answer, is_right in zip(answers, right, strict=True):
        if votes.get(answer) == most:
            verdicts[answer] = verdicts.get(answer, False) or is_right
    return sum(verdicts.values()) / len(verdicts)


def mcnemar_p(gained: int, lost: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947): the binomial test of gained against lost problems."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)
