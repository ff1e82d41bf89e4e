"""The scorers of reasoning-gym (extra reasoning-gym), for the problems of `data=reasoning_gym`."""

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reasoning_gym.factory import get_score_answer_fn

from grpo.rewards.lenient import last_boxed
from grpo.rewards.math_xml import Completion, completion_text, extract_answer

# The answer of a problem that has several and no reference, as in grpo.data.reasoning_gym, which is above this module.
NO_REFERENCE = "(any answer that the task accepts)"
_scorer: Callable[[str], Callable[..., float]] = functools.cache(get_score_answer_fn)


def score(
    prompts: Sequence,
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None],
    *,
    scale: float = 2.0,
    partial: bool = False,
    **columns: object,
) -> list[float | None]:
    r"""`scale` for each completion whose answer gets the full score of its task, else 0.0.

    The answer is the text of the last ``<answer>`` block, or else of the last ``\boxed{...}``. It is wrong if it is not
    `is_harmless`, since some scorers run it as code. partial: whether a lower score s pays `scale` * s. Many tasks give
    one to wrong answers, for example to a text that contains the right one among others. None for a problem without the
    metadata of reasoning-gym.
    """
    rows = zip(completions, question, answer, metadata, strict=True)
    rewards: list[float | None] = []
    for completion, asked, reference, about in rows:
        if not about or "source_dataset" not in about:
            rewards.append(None)
            continue
        text = completion_text(completion)
        entry = {"question": asked, "answer": None if reference == NO_REFERENCE else reference, "metadata": about}
        value = _score(extract_answer(text) or last_boxed(text), entry)
        rewards.append(scale * value if partial or value >= 1 else 0.0)
    return rewards


# Several scorers run the answer as Python code, so only these words may stand in front of an opening bracket.
BEFORE_BRACKET = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "sqrt", "Abs"}
BEFORE_BRACKET |= {"and", "or", "not"}
_WORD = re.compile(r"(?<![\w.])[A-Za-z][A-Za-z0-9]*$")
_NUMBER = re.compile(r"(?<![\w.])[0-9.]+$")


def is_harmless(answer: str) -> bool:
    """Whether an answer, run as Python code, can call nothing but mathematical functions."""
    text = unicodedata.normalize("NFKC", answer)  # as Python reads names
    if "__" in text:
        return False
    if "(" in text and ("#" in text or "\\" in text):  # comments and continued lines can hide what is before it
        return False
    return all(_may_stand_before_bracket(text[: match.start()].rstrip()) for match in re.finditer(r"\(", text))


def _may_stand_before_bracket(before: str) -> bool:
    word = _WORD.search(before)
    if word is not None:
        return word[0] in BEFORE_BRACKET
    return before == "" or before[-1] in "([{,+-*/%^=<>|&~:;!?" or _NUMBER.search(before) is not None


def _score(answer: str | None, entry: dict[str, Any]) -> float:
    if not answer or not is_harmless(answer):
        return 0.0
    try:
        return _scorer(entry["metadata"]["source_dataset"])(answer=answer, entry=entry)
    except Exception:  # of several tasks, for an answer that is not of their form
        return 0.0


def accuracy(
    prompts: Sequence,
    completions: Sequence[Completion],
    question: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None],
    **columns: object,
) -> list[float | None]:
    """1.0 for each completion with the full score of its task, else 0.0; its mean is the accuracy."""
    return score(prompts, completions, question, answer, metadata, scale=1.0)
