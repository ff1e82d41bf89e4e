"""Rewards for maths answers written as ``<reasoning>...</reasoning><answer>...</answer>``.

Two components, each in TRL's form ``f(prompts, completions, **columns) -> list[float]``: `correctness` (2.0 for
the exact text of the reference, 1.5 for the same number written differently, 0.0 if wrong) and `tag_format` (0.2 for
each of the four tags). A completion is a plain string or a list of chat messages. No completion makes them raise or
hang.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction

Completion = str | Sequence[Mapping[str, str]]

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# Longer texts are not parsed. The limit is below 640, the smallest value to which Python's limit for converting digits
# to int can be set, so that this conversion never raises; and no pattern below takes noticeable time on such a text.
MAX_LENGTH = 500
# 10**1000 is computed at once; 10**999999999 would not be.
MAX_EXPONENT = 1000

_CURRENCY = "$£€¥₹"
# Commas group thousands only if every group is correct: 1,234 and 1,234,567, but not 1,23 nor 0,123 nor 1234,567.
_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<prefix>[-+]?[{_CURRENCY}][ ]?|[{_CURRENCY}]?[-+])?
    (?:
        (?:(?P<whole>{_INTEGER})[ ]+)?(?P<numerator>{_INTEGER})[ ]*/[ ]*(?P<denominator>{_INTEGER})
      | (?P<decimal>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<exponent>[-+]?[0-9]+))?
    )
    """,
    re.VERBOSE,
)

# Text around the number (which is replaced by "#") that shows that the number is not the value of the text.
_CHANGES_VALUE = re.compile(
    r"""
      [+*^\\{}√π±÷\xd7]                  # part of a calculation (\xd7 is the times sign), or LaTeX not understood
    | -(?![A-Za-z])                      # a minus that is not a hyphen: "- 18", "18 - x"
    | [A-Za-z_.][#] | /[ ]*[#]           # part of a name or a quotient: "x2", "No.5", "miles/4"
    | [#][ ]?(?:[kKMB]|bn|mn)\b          # "18k"
    | (?i:\b(?:hundred|thousand|million|billion|trillion|half|minus|negative))
    """,
    re.VERBOSE,
)
_COMPARISON = re.compile(r"[<>≤≥≠]|!=")

_MINUS_SIGNS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
# Applied in this order. A removed wrapper leaves a space, so that separate digits never join.
_MARKUP = (
    (re.compile(r"(?<![\w*])(\*{1,3}|`)(?!\s)([^*`]+)\1(?![\w*])"), r" \2 "),  # **18**, `18`
    (re.compile(r"\{,\}|,\\!"), ","),  # 1{,}234
    (re.compile(r"\\[ ,;:!()\[\]]"), " "),  # \(18\), 18\ dollars
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(?<=[0-9.,/])(?=\\[dt]?frac)"), " "),  # 3\frac{1}{2} is a mixed number, not 31/2
    (re.compile(r"\\[dt]?frac\{ *([0-9]+) *\}\{ *([0-9]+) *\}(?![0-9])"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\boxed\{([^{}]*)\}"), r" \1 "),
)

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


def parse_number(text: str) -> Fraction | None:
    r"""The one number that a text states, exactly; None if it states none or is ambiguous. Never raises.

    Parsed as a number:

    - integers and decimals with ASCII digits: ``18``, ``18.0``, ``.5``, ``-3``, ``+3``, ``1e3`` (exponent to +-1000);
      a comma only between correct groups of thousands: ``1,234.00``, but not ``1,23``;
    - fractions ``1/2`` and mixed numbers ``1 1/2`` (with a fraction below one) of integers;
    - a minus sign: a hyphen, Unicode minus or en dash directly before the number or its currency sign: ``-$5``,
      ``$-5``. Followed by a space (``- 18``) it may be a bullet or a dash: None.

    The number may be surrounded by words, units, currency signs, punctuation, Markdown emphasis and the simple LaTeX of
    ``\boxed{18}``, ``\$18``, ``$18$``, ``\(18\)``, ``\text{}`` and ``\frac{1}{2}``. A percent sign is a unit, like
    dollars: ``50%`` is 50 and not 1/2, because GSM8K asks "what percentage" and has the plain ``50`` as answer.
    "dozen" is a unit for the same reason.

    In a text with equals signs the part after the last one counts: ``x = 18``, ``9 + 9 = 18``. Each part before it
    must be a name, without digits, or a calculation, without letters; ``x = 18, y = 20`` states two numbers: None.

    Otherwise the text must contain exactly one number. The result is therefore None for ``18 or 20``, ``18-20``,
    ``9 + 9``, ``2^2``, ``5:30``, ``3 hours 20 minutes``, and even for ``18 (18)``. It is also None for words of scale
    or sign (``3 million``, ``18k``, ``minus 3``, ``3 and a half``), operators (``18 + x``), comparisons
    (``x > 18``), digits in a name (``x2``), numerals that are not ASCII digits (``10²``, ``1½``, fullwidth digits),
    division by zero, ``inf``, ``nan``, an exponent beyond the bound, a text of more than `MAX_LENGTH` characters.
    """
    text = text.strip().translate(_MINUS_SIGNS)
    if len(text) > MAX_LENGTH or _COMPARISON.search(text) or any(map(_is_foreign_numeral, text)):
        return None
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)

    *left, text = text.split("=")
    if any(re.search("[0-9]", part) and re.search("[A-Za-z]", part) for part in left):
        return None
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1 or _CHANGES_VALUE.search(_NUMBER.sub("#", text)):
        return None
    return _value(numbers[0])


def _is_foreign_numeral(character: str) -> bool:
    """Whether a character is a numeral (digit, superscript, fraction, Roman) other than 0 to 9."""
    return not character.isascii() and unicodedata.category(character).startswith("N")


def _value(number: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER`; None for a zero denominator, `1 5/2`, or an exponent out of bounds."""

    def integer(group: str) -> int:
        return int((number[group] or "0").replace(",", ""))

    if number["decimal"]:
        exponent = integer("exponent")
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(number["decimal"].replace(",", "")) * Fraction(10) ** exponent
    else:
        numerator = integer("numerator")
        denominator = integer("denominator")
        # "18 20/5" is not a mixed number but two numbers.
        if denominator == 0 or (number["whole"] and numerator >= denominator):
            return None
        value = integer("whole") + Fraction(numerator, denominator)
    return -value if "-" in (number["prefix"] or "") else value


def same_number(a: str, b: str) -> bool:
    """Whether both texts state a number, by the rules of `parse_number`, and these are exactly equal."""
    value = parse_number(a)
    return value is not None and value == parse_number(b)


def gsm8k_answer(text: str) -> str:
    """The final answer of a GSM8K solution: what follows the last ``####``, stripped, without thousands commas.

    Raises ValueError if there is no ``####`` or nothing after it.
    """
    _, marker, answer = text.rpartition("####")
    answer = answer.strip()
    if not marker or not answer:
        raise ValueError(f"no final answer after '####' in the solution {text[-200:]!r}")
    return _THOUSANDS_COMMA.sub("", answer)


def _grade(answer: str | None, reference: str) -> str:
    """'exact', 'same_number' or 'wrong'. A missing or empty answer is wrong for any reference."""
    if not answer:
        return "wrong"
    if answer == reference.strip():
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
        rewards[_grade(extract_answer(completion_text(completion)), reference)]
        for completion, reference in zip(completions, answer, strict=True)
    ]


def accuracy(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 for each completion whose answer is exact or the same number, else 0.0; its mean is the accuracy."""
    return correctness(prompts, completions, answer, exact=1.0, same_number=1.0)


def tag_format(
    prompts: Sequence, completions: Sequence[Completion], *, tag_reward: float = 0.2, **columns: object
) -> list[float]:
    """The format reward of each completion: `tag_reward` for each of the four `TAGS` that occurs at least once.

    From 0.0 to four times `tag_reward`. Case-sensitive; order, repetition and the text between do not matter.
    `prompts` and other columns are not used.
    """
    texts = map(completion_text, completions)
    return [tag_reward * sum(tag in text for tag in TAGS) for text in texts]
