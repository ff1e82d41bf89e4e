"""Splits plain text (`grpo.rewards.notation`) into tokens, with one token for a number in English words."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from grpo.rewards import words

# 10**1000 is computed at once; 10**999999999 would not be.
MAX_EXPONENT = 1000


class Refused(Exception):
    """The text does not state exactly one number."""


@dataclass(frozen=True)
class Token:
    """A piece of a plain text."""

    kind: str  # number, word, operator, bracket, percent, comma, remark, end (of a statement)
    text: str
    after_space: bool = True  # or at the beginning
    value: Fraction = Fraction(0)
    percent: bool = False

    @property
    def word(self) -> str:
        """The word in lower case; empty for any other kind."""
        return self.text.lower() if self.kind == "word" else ""


_TOKEN = re.compile(
    r"""
      (?P<number>(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)
        (?![0-9]|[.,][0-9])
    | (?P<word>[A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u024f]+(?:['-][A-Za-z\xc0-\xd6\xd8-\xf6\xf8-\u024f]+)*)
    | (?P<end>[;\n]|(?<![0-9]):|:(?![0-9])|(?<!\.)\.(?![0-9.])|(?<=[A-Za-z]{2})!(?=\s|$))
    | (?P<operator>=+|[-+*/^])
    | (?P<bracket>[()])
    | (?P<percent>%)
    | (?P<comma>(?<![0-9]),|,(?![0-9]))
    | (?P<space>\s+|')
    """,
    re.VERBOSE,
)


def read_tokens(text: str) -> list[Token]:
    """The tokens of a plain text. Raises Refused for a character that none of them has, and for malformed numbers."""
    return _fold_number_words(list(_split(text)))


def _split(text: str) -> Iterator[Token]:
    position = 0
    after_space = True
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Refused
        kind = match.lastgroup or ""
        if kind == "number" and text[position - 1 : position].isalpha():
            raise Refused  # x2, USD18 with an unknown code
        if kind != "space":
            yield Token(kind, match[0], after_space, _literal(match[0]) if kind == "number" else Fraction(0))
        after_space = kind == "space"
        position = match.end()


def _literal(number: str) -> Fraction:
    mantissa, _, exponent = number.lower().replace(",", "").partition("e")
    if abs(int(exponent or 0)) > MAX_EXPONENT:
        raise Refused
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _fold_number_words(tokens: list[Token]) -> list[Token]:
    """The tokens, with a number in place of "seventy-two", "a hundred and five" or "3 million"."""
    folded: list[Token] = []
    position = 0
    while position < len(tokens):
        first = tokens[position]
        run = _number_words(tokens[position:])
        if run:
            _add_number(folded, [piece for token in run for piece in token.word.split("-")], first.after_space)
        else:
            folded.append(first)
        position += max(1, len(run))
    return folded


def _add_number(folded: list[Token], spelled: list[str], after_space: bool) -> None:
    """Append the number with these words; a single scale after a number in digits is multiplied with it."""
    previous = folded[-1] if folded else None
    is_scale = previous is not None and previous.kind == "number" and len(spelled) == 1
    value = words.spelled_number(["one", *spelled] if is_scale else spelled)
    if value is None or (not after_space and previous and previous.kind in ("number", "word")):
        raise Refused
    if is_scale and previous:
        folded[-1] = replace(previous, text=f"{previous.text} {spelled[0]}", value=previous.value * value)
    else:
        folded.append(Token("number", " ".join(spelled), after_space, Fraction(value)))


def _number_words(tokens: list[Token]) -> list[Token]:
    """The number words at the beginning of the tokens, with an "and" or "a" that belongs to them."""

    def is_number(token: Token | None) -> bool:
        return token is not None and all(piece in words.NUMBER_WORDS for piece in token.word.split("-"))

    run: list[Token] = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        joins = token.word == "and" and run and following and is_number(following)
        begins = token.word == "a" and not run and following and following.word in ("hundred", *words.SCALES)
        if not (is_number(token) or joins or begins):
            break
        run.append(token)
    return run
