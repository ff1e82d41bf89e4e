"""The answer of a completion as evaluation harnesses read it: with or without tags, boxed, or the last number.

Rewards use `grpo.rewards.math_xml` instead, which requires the tags: a reward for the last number of any text is easily
gamed. For an evaluation it shows whether a model that ignores the format knows the answer.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from grpo.rewards.math_xml import Completion, completion_text, extract_answer
from grpo.rewards.number import parse_number

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w.)\]}])-)? [$\u20ac\xa3]? (?:
        \\[dt]?frac\{(?P<numerator>-?\d{1,400})\}\{(?P<denominator>\d{1,400})\}
      | (?P<whole>\d{1,3}(?:(?:,|\{,\}|\\,)\d{3}){1,100}(?!\d) | \d{1,400}) (?P<decimals>\.\d{1,400})?
        (?: /(?P<over>\d{1,400})(?![\d.]) )?
      | (?P<fraction>\.\d{1,400})
    )
    """,
    re.VERBOSE | re.ASCII,
)
MOST_BOXES = 20  # unclosed boxes that are looked through from the end


def final_answer(text: str) -> str | Fraction | None:
    """The answer that a completion ends with: a number, or else the text of its answer block or box.

    It is, in this order, what the last answer block states (`extract_answer`, `parse_number`), the content of the last
    ``\\boxed{}``, what follows the last ``####`` on its line, or the last number of the text. Of that a sign, a
    currency sign, commas between groups of thousands, decimals and a fraction ``a/b`` are read. None if there is none.
    """
    block = extract_answer(text)
    boxed = last_boxed(text)
    marked = text.rpartition("####")[2].splitlines()[:1] if "####" in text else []
    stated = [each for each in (block, boxed, *marked) if each]
    for each in stated:
        value = parse_number(each)
        if value is not None:
            return value
    value = last_number(text)
    return value if value is not None else next(iter(stated), None)


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, with nested braces; None if there is none."""
    for match in list(_BOXED.finditer(text))[: -MOST_BOXES - 1 : -1]:
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip()
    return None


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None if it has none."""
    found = list(_NUMBER.finditer(text.replace("\u2212", "-")))
    if not found:
        return None
    match = found[-1]
    sign = -1 if match["sign"] else 1
    if match["numerator"]:
        over = int(match["denominator"])
        return sign * Fraction(int(match["numerator"]), over) if over else None
    digits = re.sub(r"[^0-9]", "", match["whole"] or "")
    value = Fraction((digits or "0") + (match["decimals"] or match["fraction"] or ""))
    over = int(match["over"] or 1)
    return sign * value / over if over else None


def lenient(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 for each completion whose `final_answer` is the reference, as the same number or the same text, else 0.0.

    `answer` has one reference text per completion; `prompts` and other columns are not used.
    """
    texts = map(completion_text, completions)
    return [float(_is_right(text, reference)) for text, reference in zip(texts, answer, strict=True)]


def _is_right(text: str, reference: str) -> bool:
    block = extract_answer(text)
    if reference.strip() == block:
        return True
    decides = block is not None and parse_number(block) is not None
    if not decides and reference.strip() == last_boxed(text):
        return True
    return is_answer(final_answer(text), reference)


def is_answer(found: str | Fraction | None, reference: str) -> bool:
    """Whether what `final_answer` found is the reference text, or the number that the reference states."""
    if isinstance(found, Fraction):
        return found == parse_number(reference)
    return found is not None and found == reference.strip()
