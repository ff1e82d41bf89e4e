"""Rewards beside correctness: the form of a completion, its length, and repetition.

Each function has TRL's form ``f(prompts, completions, **columns) -> list[float]``.
"""

from collections.abc import Sequence

from grpo.rewards import math_boxed, math_xml
from grpo.rewards.math_xml import TAGS, Completion, completion_text, well_formed


def strict_format(
    prompts: Sequence, completions: Sequence[Completion], *, value: float = 0.5, **columns: object
) -> list[float]:
    """`value` for each completion that is one reasoning block, one answer block and nothing else (`well_formed`)."""
    return [value * each for each in well_formed(prompts, completions)]


def tag_order(
    prompts: Sequence, completions: Sequence[Completion], *, tag_reward: float = 0.1, **columns: object
) -> list[float]:
    """`tag_reward` for each of the four `TAGS`, as long as they occur exactly once and in their order.

    From 0.0 to four times `tag_reward`. A tag that is missing, repeated or too early ends the count.
    """
    return [tag_reward * _tags_in_order(completion_text(each)) for each in completions]


def _tags_in_order(text: str) -> int:
    position = 0
    for count, tag in enumerate(TAGS):
        found = text.find(tag)
        if found < position or text.count(tag) > 1:
            return count
        position = found + len(tag)
    return len(TAGS)


def length_penalty(
    prompts: Sequence,
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    answer: Sequence[str],
    *,
    max_length: int,
    boxed: bool = False,
    **columns: object,
) -> list[float]:
    """For right completions minus the share of `max_length` tokens that they use, at least -1.0; for others 0.0.

    Only right completions are compared by length, so that a model is not paid for short wrong ones. boxed: whether the
    answer counts that is in a box instead of the answer tags, as in the reward for correctness beside this one.
    """
    _check_at_least_one(max_length=max_length)
    right = (math_boxed if boxed else math_xml).accuracy(prompts, completions, answer)
    return [-min(1.0, len(ids) / max_length) * each for ids, each in zip(completion_ids, right, strict=True)]


def overlong_penalty(
    prompts: Sequence,
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_length: int,
    margin: float = 0.2,
    **columns: object,
) -> list[float]:
    """0.0 up to (1 - `margin`) * `max_length` tokens, then falling linearly to -1.0 at `max_length`.

    The soft overlong punishment of DAPO (Yu et al., arXiv 2503.14476, equation 13), where the margin is 4,096 of 20,480
    tokens.
    """
    if not 0 < margin <= 1:
        raise ValueError(f"margin={margin}: must be above 0 and at most 1")
    _check_at_least_one(max_length=max_length)
    free = (1 - margin) * max_length
    return [-min(1.0, max(0.0, (len(ids) - free) / (margin * max_length))) for ids in completion_ids]


def repetition_penalty(
    prompts: Sequence, completions: Sequence[Completion], *, words: int = 3, **columns: object
) -> list[float]:
    """Minus the share of repeated sequences of `words` words, from 0.0 (none) to nearly -1.0.

    1 - distinct / all sequences, in lower case. A penalty of repeated n-grams as in Yeo et al., arXiv 2502.03373.
    """
    _check_at_least_one(words=words)
    return [-_repeated(completion_text(each).lower().split(), words) for each in completions]


def _check_at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def _repeated(words: list[str], length: int) -> float:
    sequences = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
