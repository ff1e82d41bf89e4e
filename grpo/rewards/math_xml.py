"""Rewards for maths answers written as ``<reasoning>...</reasoning><answer>...</answer>``.

Two components, each in TRL's form ``f(prompts, completions, **columns) -> list[float]``: `correctness` (2.0 for
the exact text of the reference, 1.5 for the same number written differently, 0.0 if wrong) and `tag_format` (0.2 for
each of the four tags). A completion is a plain string or a list of chat messages. No completion makes them raise or
hang.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence

from grpo.rewards.number import parse_number

Completion = str | Sequence[Mapping[str, str]]

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

_WELL_FORMED = re.compile(r"\s*<reasoning>.*</reasoning>\s*<answer>.*</answer>\s*", re.DOTALL)
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def completion_text(completion: Completion) -> str:
    """The text of one completion: a plain string unchanged, or the joined contents of the assistant's messages.

    Raises TypeError or KeyError for any other value.
    """
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] or "" for message in completion if message["role"] == "assistant")


def extract_answer(text: str) -> str | None:
    """The text of the last complete answer block, without the white space around it; None if there is no such block.

    A block begins at an ``<answer>`` and ends at the first ``</answer>`` after it. The last ``<answer>`` that is
    followed by any ``</answer>`` begins the block that counts. Hence:

    - of several blocks the last one counts, as the model's final answer, even inside the reasoning;
    - of nested or repeated opening tags the innermost one counts;
    - an unclosed block after a complete one, and extra closing tags, change nothing;
    - an empty block gives ``""``.

    Tags are case-sensitive and carry no attributes.
    """
    opening = "<answer>"
    closing = "</answer>"
    last_close = text.rfind(closing)
    begin = text.rfind(opening, 0, max(last_close, 0))
    if begin < 0:
        return None
    begin += len(opening)
    return text[begin : text.find(closing, begin)].strip()


def same_number(a: str, b: str) -> bool:
    """Whether both texts state a number, as `grpo.rewards.number.parse_number` reads it, and these are equal."""
    value = parse_number(a)
    return value is not None and value == parse_number(b)


def gsm8k_answer(text: str) -> str:
    """The final answer of a GSM8K solution: what follows the last ``####`` on its line, without thousands commas.

    Raises ValueError if there is no ``####`` or nothing after it on its line.
    """
    _, marker, rest = text.rpartition("####")
    answer = "".join(rest.splitlines()[:1]).strip()
    if not marker or not answer:
        raise ValueError(f"no final answer on the line of '####' in the solution {text[-200:]!r}")
    return _THOUSANDS_COMMA.sub("", answer)


def grade(answer: str | None, reference: str, is_exact: Callable[[str, str], bool] = operator.eq) -> str:
    """'exact', 'same_number' or 'wrong'. A missing or empty answer is wrong for any reference.

    is_exact: whether two texts are the same.
    """
    if not answer:
        return "wrong"
    if is_exact(answer, reference.strip()):
        return "exact"
    return "same_number" if same_number(answer, reference) else "wrong"


def correctness(
    prompts: Sequence,
    completions: Sequence[Completion],
    answer: Sequence[str],
    *,
    exact: float = 2.0,
    same_number: float = 1.5,
    **columns: object,
) -> list[float]:
    """The correctness reward of each completion, based on its `extract_answer`.

    `exact` if the answer equals the reference text up to surrounding white space, `same_number` if it is the same
    number written differently (see `parse_number`), else 0.0. `answer` has one reference text per completion;
    `prompts` and other columns are not used. Raises ValueError if the numbers of completions and references differ.
    """
    rewards = {"exact": exact, "same_number": same_number, "wrong": 0.0}
    return [
        rewards[grade(extract_answer(completion_text(completion)), reference)]
        for completion, reference in zip(completions, answer, strict=True)
    ]


def accuracy(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 for each completion whose answer is exact or the same number, else 0.0; its mean is the accuracy."""
    return correctness(prompts, completions, answer, exact=1.0, same_number=1.0)


def strict(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 for each completion whose answer is exactly the reference text, up to white space around it, else 0.0."""
    return correctness(prompts, completions, answer, exact=1.0, same_number=0.0)


def well_formed(prompts: Sequence, completions: Sequence[Completion], **columns: object) -> list[float]:
    """1.0 for each completion that is one reasoning block followed by one answer block and nothing else, else 0.0."""
    texts = map(completion_text, completions)
    return [float(bool(_WELL_FORMED.fullmatch(text)) and all(text.count(tag) == 1 for tag in TAGS)) for text in texts]


def tag_format(
    prompts: Sequence, completions: Sequence[Completion], *, tag_reward: float = 0.2, **columns: object
) -> list[float]:
    """The format reward of each completion: `tag_reward` for each of the four `TAGS` that occurs at least once.

    From 0.0 to four times `tag_reward`. Case-sensitive; order, repetition and the text between do not matter.
    `prompts` and other columns are not used.
    """
    texts = map(completion_text, completions)
    return [tag_reward * sum(tag in text for tag in TAGS) for text in texts]
