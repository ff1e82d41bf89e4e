"""Why answers are wrong: a category for each wrong completion of an evaluation."""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from grpo.rewards.calculation import calculate
from grpo.rewards.lenient import final_answer, is_answer, last_boxed
from grpo.rewards.lexer import Refused, read_tokens
from grpo.rewards.math_xml import extract_answer
from grpo.rewards.number import parse_number

# In this order: a completion is in the first that holds.
CATEGORIES = {
    "right elsewhere": "it ends with the right number, or computes it, but does not answer with it",
    "truncated": "it reached the limit of tokens",
    "no answer tag": "it has no complete answer block and no box",
    "arithmetic slip": "an equation that it wrote is false",
    "other": "none of these",
}

_NUMBER = r"\$?(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})(?:\.\d{1,30})?%?"
_LIST_MARKER = re.compile(r"\s*(?:[-*\u2022]|\(?\w{1,2}[.)])\s+")
_EQUATION = re.compile(
    rf"(?<![\w.,])({_NUMBER}(?:\s*[-+*/x\u00d7\u00f7]\s*{_NUMBER}){{1,12}})\s*=\s*(?=\$?(-?{_NUMBER}))"
)
_CONTINUES = re.compile(r"(?:[-+*/\u00d7\u00f7^)\d]|(?<![A-Za-z])x)\s*$")
_SIGNS = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "$": "", ",": ""})


def why_wrong(row: Mapping[str, Any]) -> str | None:
    """The category of a row of eval/*.json; None if the completion is right or was not graded."""
    if row.get("correct") is not False:
        return None
    text = row["completion"]
    reference = parse_number(row["answer"])
    results = list(equations(text))
    computed = reference is not None and any(stated == reference == value for value, stated in results)
    if computed or is_answer(final_answer(text), row["answer"]):
        return "right elsewhere"
    if row.get("truncated"):
        return "truncated"
    if extract_answer(text) is None and last_boxed(text) is None:
        return "no answer tag"
    if any(not _is_rounded(value, stated) for value, stated in results):
        return "arithmetic slip"
    return "other"


def equations(text: str) -> Iterator[tuple[Fraction, Fraction]]:
    """The value of each calculation with + - * / that is followed by ``=``, and the result that is stated.

    Each line is read by itself, without the marker of a list in front of it. A dash is a minus sign if the equation is
    true then.
    """
    for line in text.splitlines():
        marker = _LIST_MARKER.match(line)
        found = [*_equations_of(line[marker.end() :] if marker else line)]
        if marker and "-" in marker[0]:
            negative = [*_equations_of(f"0 - {line[marker.end() :]}")]
            found = negative if negative and negative[0][0] == negative[0][1] else found
        yield from found


def _equations_of(line: str) -> Iterator[tuple[Fraction, Fraction]]:
    for match in _EQUATION.finditer(line):
        if _CONTINUES.search(line[max(0, match.start() - 20) : match.start()]):
            continue  # the end of a longer calculation
        try:
            tokens = read_tokens(re.sub(r"([\d.]+)%", r"(\1 / 100)", match[1].translate(_SIGNS)))
            yield calculate(tokens, 1), Fraction(match[2].translate(_SIGNS).removesuffix("%")) / _unit(match[2])
        except Refused:  # a division by zero
            continue


def _unit(number: str) -> int:
    return 100 if number.endswith("%") else 1


def _is_rounded(value: Fraction, stated: Fraction) -> bool:
    """Whether the stated result is the value; if it is no whole number, up to one hundredth or half a per cent."""
    if value.denominator == 1:
        return value == stated
    return abs(value - stated) <= max(Fraction(1, 100), abs(value) / 200)
