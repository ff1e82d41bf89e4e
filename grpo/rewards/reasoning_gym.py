"""The scorers of reasoning-gym (extra reasoning-gym), for the problems of `data=reasoning_gym`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reasoning_gym.factory import get_score_answer_fn

from grpo.rewards.lenient import last_boxed
from grpo.rewards.math_xml import Completion, completion_text, extract_answer

_scorer: Callable[[str], Callable[..., float]] = functools.cache(get_score_answer_fn)


def score(
    prompts: Sequence,
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None],
    *,
    scale: float = 2.0,
    least: float = 0.05,
    **columns: object,
) -> list[float | None]:
    r"""`scale` times the score, from 0 to 1, that the task of each problem gives to the answer of its completion.

    The answer is the text of the last ``<answer>`` block, or else of the last ``\boxed{...}``. Without an answer the
    reward is 0.0, and also for a score up to `least`: many tasks give 0.01 to any wrong answer. None for a problem
    without the metadata of reasoning-gym.
    """
    rows = zip(completions, question, answer, metadata, strict=True)
    rewards: list[float | None] = []
    for completion, asked, reference, about in rows:
        if not about or "source_dataset" not in about:
            rewards.append(None)
            continue
        text = completion_text(completion)
        found = extract_answer(text) or last_boxed(text)
        entry = {"question": asked, "answer": reference, "metadata": about}
        value = _scorer(about["source_dataset"])(answer=found, entry=entry) if found else 0.0
        rewards.append(scale * value if value > least else 0.0)
    return rewards


def accuracy(
    prompts: Sequence,
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None],
    **columns: object,
) -> list[float | None]:
    """1.0 for each completion with the full score of its task, else 0.0; its mean is the accuracy."""
    scores = score(prompts, completions, question, answer, metadata, scale=1.0)
    return [None if each is None else float(each >= 1.0) for each in scores]
