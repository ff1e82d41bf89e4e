"""The value of a calculation, as an exact fraction."""

from collections.abc import Sequence
from fractions import Fraction

from grpo.rewards.lexer import Refused, Token

# Of the numerator and the denominator of a calculated value.
MAX_BITS = 20_000

_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 3}


def calculate(items: Sequence[Token], percent: Fraction | int) -> Fraction:
    """The value of numbers, signs, brackets and operators, which are well formed.

    Numbers with a percent sign are multiplied by `percent`. Raises Refused for a division by zero, for a power whose
    exponent is not a whole number, and for values of more than `MAX_BITS` bits.
    """
    return _calculate(list(reversed(items)), 1, Fraction(percent))


def _calculate(reversed_items: list[Token], lowest: int, percent: Fraction) -> Fraction:
    """Precedence climbing: the value of the operators of at least the lowest precedence. Removes what it has read."""
    token = reversed_items.pop()
    if token.kind == "sign":
        value = _calculate(reversed_items, _PRECEDENCE["^"], percent) * (-1 if token.text == "-" else 1)
    elif token.text == "(":
        value = _calculate(reversed_items, 1, percent)
        reversed_items.pop()
    else:
        value = token.value * (percent if token.percent else 1)
    while reversed_items and _PRECEDENCE.get(reversed_items[-1].text, 0) >= lowest:
        operator = reversed_items.pop().text
        tighter = _PRECEDENCE[operator] + (operator != "^")
        value = _apply(operator, value, _calculate(reversed_items, tighter, percent))
    return value


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    if operator == "/" and right == 0:
        raise Refused
    if operator == "^":
        bits = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) * bits > MAX_BITS or (left == 0 and right < 0):
            raise Refused
        return left**right.numerator
    value = {"+": left.__add__, "-": left.__sub__, "*": left.__mul__, "/": left.__truediv__}[operator](right)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Refused
    return value
