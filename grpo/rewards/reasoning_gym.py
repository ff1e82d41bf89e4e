"""The scorers of reasoning-gym (extra reasoning-gym), for the problems of `data=reasoning_gym`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo.rewards.lenient import last_boxed
from grpo.rewards.math_xml import Completion, completion_text, extract_answer

NO_REFERENCE = "(any answer that the task accepts)"  # the answer of a problem that has several, and no reference
# Tasks of reasoning-gym 0.1.25 whose scorers pass the answer, the reference or the metadata to eval, exec or SymPy's
# parse_expr, which evaluates Python code.
RUN_CODE = frozenset(
    {"binary_matrix", "bitwise_arithmetic", "codeio", "countdown", "intermediate_integration", "n_queens"}
    | {"number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix"}
    | {"string_insertion"}
)


@functools.cache
def _scorer(task: str) -> Callable[..., float]:
    from reasoning_gym.factory import get_score_answer_fn  # here, since grpo.data needs only the constants

    return get_score_answer_fn(task)


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

    The answer is the text of the last ``<answer>`` block, or else of the last ``\boxed{...}``. partial: whether a
    lower score s pays `scale` * s. Many tasks give one to wrong answers, for example to a text that contains the right
    one among others. None for a problem without the metadata of reasoning-gym. Raises ValueError for the tasks of
    RUN_CODE.
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


def _score(answer: str | None, entry: dict[str, Any]) -> float:
    task = entry["metadata"]["source_dataset"]
    if task in RUN_CODE:
        raise ValueError(f"the scorer of {task} runs the answer or the problem as Python code, so it is not used")
    if not answer:
        return 0.0
    try:
        return _scorer(task)(answer=answer, entry=entry)
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
