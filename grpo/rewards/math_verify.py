"""Correctness by Math-Verify, which compares formulas with SymPy: sets, intervals, matrices, equivalent expressions.

Math-Verify only compares formulas. Which text is the answer is decided here, and numbers are compared here, since it
also finds numbers in any text, and accepts texts that do not state the answer (docs/grading.md) and calculations of it.
It should run in the reward process (isolate: true): SymPy can take arbitrarily long.
"""

from collections.abc import Sequence

import math_verify

from grpo.rewards.lenient import last_boxed
from grpo.rewards.math_boxed import same_latex
from grpo.rewards.math_xml import Completion, completion_text, extract_answer
from grpo.rewards.number import parse_number

MAX_CHARACTERS = 500  # of an answer; longer ones are wrong


def correctness(
    prompts: Sequence,
    completions: Sequence[Completion],
    answer: Sequence[str],
    *,
    right: float = 2.0,
    timeout_s: int = 5,
    **columns: object,
) -> list[float | None]:
    r"""`right` for each completion whose answer Math-Verify finds equal to the reference, else 0.0.

    The answer is the content of the last ``\boxed{...}``, or else of the last ``<answer>`` block. If the reference is a
    number, the answer must be the same number, as `grpo.rewards.number.parse_number` reads it. None if the reference
    cannot be read as a formula. timeout_s: seconds for reading and for comparing one formula; then it is wrong.
    """
    pairs = zip(completions, answer, strict=True)
    return [_reward(completion_text(each), reference, right, timeout_s) for each, reference in pairs]


def accuracy(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float | None]:
    """1.0 for each completion whose answer Math-Verify finds equal to the reference, else 0.0; its mean: accuracy."""
    return correctness(prompts, completions, answer, right=1.0)


def _reward(text: str, reference: str, right: float, timeout_s: int) -> float | None:
    found = last_boxed(text) or extract_answer(text)
    number = parse_number(reference)
    if number is not None:  # Math-Verify would also accept a calculation, such as 9 + 9 for 18
        return right if found and parse_number(found) == number else 0.0
    gold = _read(reference, timeout_s)
    if not gold:
        return None
    if not found or len(found) > MAX_CHARACTERS or found.count("=") > 1 or found.count("_") != reference.count("_"):
        return 0.0
    if same_latex(found, reference):
        return right
    return right if math_verify.verify(gold, _read(found, timeout_s), timeout_seconds=timeout_s) else 0.0


def _read(formula: str, timeout_s: int) -> list:
    inside = formula.strip().removesuffix(".").strip("$")
    return math_verify.parse(rf"$\boxed{{{inside}}}$", parsing_timeout=timeout_s)
