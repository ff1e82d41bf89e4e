"""Reads the one number that a text states: `parse_number`. docs/grading.md has the rule on one page.

The text is rewritten as plain text (`grpo.rewards.notation`) and split into tokens. The tokens form statements, which
end at a full stop, colon, semicolon or line break. A statement is a chain of parts joined by equals signs. A part is a
calculation with words before it and after its numbers, which `grpo.rewards.wording` checks.
"""

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from itertools import takewhile

from grpo.rewards import words
from grpo.rewards.calculation import calculate
from grpo.rewards.lexer import Refused, Token, read_tokens
from grpo.rewards.notation import plain_text
from grpo.rewards.wording import check_after, check_before, check_bound, check_words, is_variable

# Longer texts are not parsed. The limit is below 640, the smallest value to which Python's limit for converting digits
# to int can be set, so that this conversion never raises; and no pattern takes noticeable time on such a text.
MAX_LENGTH = 500


@dataclass
class _Part:
    """What stands between two equals signs.

    `items`: the numbers and operators, in order. `shape`: one character for each of them (N a number, M a mixed number,
    s a sign, else the operator), and u where words follow. `words`: all words. `after`: those after a number.
    """

    words: set[str]
    items: list[Token] = field(default_factory=list)
    shape: str = ""
    after: list[Token] = field(default_factory=list)

    @property
    def operands(self) -> list[Fraction]:
        """The numbers with their signs."""
        before = [Token("end", ""), *self.items]
        return [
            -item.value if previous.kind == "sign" and previous.text == "-" else item.value
            for previous, item in zip(before, self.items, strict=False)
            if item.kind == "number"
        ]

    @property
    def mixes_percent(self) -> bool:
        """Whether per cent can only be hundredths: in a product, and in a sum with numbers that are no per cent."""
        percents = {item.percent for item in self.items if item.kind == "number"}
        return True in percents and (False in percents or bool(re.search(r"[*/^]", self.shape)))

    @property
    def plain(self) -> bool:
        """Whether it is a number as written, not a calculation: 18, 1/2, 1 1/2, 1.8 * 10^1."""
        numbers = [item for item in self.items if item.kind == "number"]
        shape = self.shape
        while inner := re.fullmatch(r"\((.*)\)u?", shape):
            shape = inner[1]
        if re.fullmatch(r"s?N/Nu?", shape):
            return all(re.fullmatch(r"[0-9,]+", number.text) for number in numbers)
        return bool(
            re.fullmatch(r"s?[NM]u?", shape) or (re.fullmatch(r"s?N\*N\^s?Nu?", shape) and numbers[1].text == "10")
        )


@dataclass(frozen=True)
class _Statement:
    value: Fraction
    plain: bool
    operands: list[Fraction]  # of a calculation that is followed by its result; else empty
    is_answer: bool = False  # whether it, or its label, is called the answer


def parse_number(text: str) -> Fraction | None:
    r"""The one number that a text states, exactly; None if it states none or is ambiguous. Never raises.

    docs/grading.md has the rule. In short: the text states one number, or the same one several times, written in digits
    or English words, as an integer, decimal, fraction or mixed number, with units, currency, words, Markdown and simple
    LaTeX around it. Of a calculation the number after the last equals sign counts, if every equals sign before it is
    true. Words and signs that change a number (not, twice, squared, more than, lakh, !, ~) give None, and so do all
    characters that are not understood, and a text of more than `MAX_LENGTH` characters.

    A percent sign is a unit, like dollars: ``50%`` is 50 and not 1/2, because GSM8K asks "what percentage" and has the
    plain ``50`` as answer. "dozen" is a unit for the same reason.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    return _parsed(text)


@lru_cache(maxsize=4096)  # the reference of a group is the same text
def _parsed(text: str) -> Fraction | None:
    try:
        tokens = _without_closing(read_tokens(plain_text(text)))
        check_words(tokens)
        return _agreed_value(_statements(_groups(tokens)))
    except Refused:
        return None


def _statements(groups: list[list[Token]]) -> list[_Statement]:
    """The statements that have a number. A group without a number in front of one is its label."""
    found: list[_Statement] = []
    is_answer = False
    for group in groups:
        is_answer = is_answer or any(token.word in words.ANSWER for token in group)
        if not any(token.kind == "number" for token in group):
            check_bound([token.word for token in group])  # Below average: 18
        if statement := _statement(group):
            found.append(replace(statement, is_answer=is_answer))
            is_answer = False
    return found


def _agreed_value(statements: list[_Statement]) -> Fraction:
    """The value of all statements, except calculations, not called the answer, whose result is used in a later one."""
    for index, statement in reversed(list(enumerate(statements))):
        is_step = statement.operands and not statement.is_answer
        if is_step and any(statement.value in later.operands for later in statements[index + 1 :]):
            del statements[index]
    values = {statement.value for statement in statements}
    if len(values) != 1 or not any(statement.plain for statement in statements):
        raise Refused
    return values.pop()


def _without_closing(tokens: list[Token]) -> list[Token]:
    """The tokens without the sentence "I hope it is correct." with which some models close."""
    end = len(tokens) - (tokens[-1:] != [] and tokens[-1].kind == "end")
    begin = end - len(words.CLOSING)
    is_closing = begin > 0 and [token.word for token in tokens[begin:end]] == words.CLOSING
    return tokens[:begin] if is_closing and tokens[begin - 1].kind == "end" else tokens


def _groups(tokens: list[Token]) -> list[list[Token]]:
    """The remarks in brackets that have a number, then the statements. Any other remark is skipped."""
    statements: list[list[Token]] = [[]]
    remarks: list[list[Token]] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        current = statements[-1]
        inside = _bracketed(tokens[position:])
        following = tokens[position + len(inside) + 2 :][:1]
        if inside and all(each.kind in ("word", "comma") for each in inside):
            if current and current[-1].kind == "word" and not token.after_space:
                raise Refused  # f(x)
            if any(is_variable(each) for each in inside) or inside[0].word in words.NOT_IN_A_REMARK:
                raise Refused
            current.append(Token("remark", ""))
            position += len(inside) + 2
        elif inside and token.after_space and _is_remark(current, following):
            current.append(Token("remark", ""))
            remarks.append(inside)
            position += len(inside) + 2
        elif token.kind == "comma" and _is_time(current):
            statements[-1] = []
            position += 1
        elif token.kind == "end" or (token.kind == "comma" and _ends_statement(current, tokens[position + 1 :])):
            statements.append([])
            position += 1
        else:
            current.append(token)
            position += 1
    return remarks + [_without_connective(statement) for statement in statements]


def _is_time(clause: list[Token]) -> bool:
    """Whether a clause says when: "After 3 days, she has 18 eggs"."""
    kinds = [token.kind for token in clause]
    return (
        kinds == ["word", "number", "word"]
        and clause[0].word in words.BEFORE_A_TIME
        and clause[2].word in words.PERIODS
    )


def _ends_statement(before: list[Token], after: list[Token]) -> bool:
    """Whether a comma ends a statement: "9 + 9 = 18, 18 * 2 = 36", "18, so the answer is 18"."""
    if not any(token.kind == "number" for token in before) or not any(token.kind == "number" for token in after):
        return False
    return after[0].word in words.CONNECTIVES or any(token.text == "=" for token in before)


def _without_connective(statement: list[Token]) -> list[Token]:
    """The statement without "since" or "as" in front of a calculation with its result."""
    is_claim = any(token.text == "=" for token in statement)
    return statement[1:] if is_claim and statement[0].word in ("since", "as") else statement


def _bracketed(tokens: list[Token]) -> list[Token]:
    """What is between the bracket that opens here and its end; empty if none opens, or if there is another inside."""
    if tokens[0].text != "(":
        return []
    inside = list(takewhile(lambda token: token.kind != "bracket", tokens[1:]))
    return inside if tokens[len(inside) + 1 : len(inside) + 2] and tokens[len(inside) + 1].text == ")" else []


def _is_remark(before: list[Token], following: list[Token]) -> bool:
    """Whether brackets with a number in them are a remark on the number before, not part of a calculation."""
    return (
        any(token.kind == "number" for token in before)
        and before[-1].kind in ("number", "word", "percent", "remark")
        and not (following and following[0].kind in ("operator", "number", "bracket"))
    )


def _statement(tokens: list[Token]) -> _Statement | None:
    """The value after the last equals sign; None if there is no number. Refused unless every equals sign is true."""
    groups: list[list[Token]] = [[]]
    for token in tokens:
        if token.text.startswith("="):
            groups.append([])
        else:
            groups[-1].append(token)
    parts = [_part(group) for group in groups]
    if not any(part.items for part in parts):
        return None
    last = parts[-1]
    if not last.items:
        raise Refused
    value = calculate(last.items, 1)
    first_is_name = len(parts) > 1 and _is_name(parts[0], last)
    claimed = [part for part in parts[first_is_name:] if part.items]
    # A percent sign means hundredths, or is a unit if it stands at each number of a part or at none: 20% + 30% = 50%.
    may_be_unit = not any(part.mixes_percent for part in claimed)
    percents = [Fraction(1, 100), Fraction(1)] if may_be_unit else [Fraction(1, 100)]
    if not any(len({calculate(part.items, percent) for part in claimed}) == 1 for percent in percents):
        raise Refused
    operands = parts[0].operands
    return _Statement(value, last.plain, operands if len(parts) > 1 and len(operands) > 1 else [])


def _is_name(part: _Part, last: _Part) -> bool:
    """Whether a part with a number is the name of what follows, as in "3 days = 18" and "1.5 dozen = 18 eggs".

    With any other unit it is a claim: 5 kg = 18, 20 apples = 18 pears. Units are not converted, except dozens.
    """
    if any(token.word == "dozen" for token in part.after):
        if part.shape != "Nu" or 12 * part.items[0].value != calculate(last.items, 1):
            raise Refused
        return True
    unit = [token.word for token in part.after]
    units_after = {token.word for token in last.after}
    return (
        part.shape == "Nu"
        and " " not in part.items[0].text
        and len(unit) == 1
        and unit[0] in words.PERIODS
        and not units_after & (words.PERIODS | words.UNITS)
        and part.words - words.PERIODS <= words.BEFORE_A_PERIOD
    )


def _part(tokens: list[Token]) -> _Part:
    part = _Part({token.word for token in tokens if token.word})
    before = list(takewhile(lambda token: token.kind in ("word", "comma", "remark"), tokens))
    rest = tokens[len(before) :]
    if not any(token.kind == "number" for token in rest):
        _check_name(tokens)
        return part
    check_before(before, rest)
    position = 0
    while position < len(rest):
        position = _read_item(part, rest, position, bool(before))
    if part.shape.count("(") != part.shape.count(")") or not re.search(r"[NMu)]$", part.shape):
        raise Refused
    return part


def _check_name(tokens: list[Token]) -> None:
    """Refuse a part without a number unless it is a name, such as x, Total cost, or price - cost."""
    variables = [token for token in tokens if len(token.word) == 1 and token.word not in ("a", "i")]
    if not any(token.kind in ("operator", "bracket", "percent") for token in tokens):
        if len(variables) > 1:
            raise Refused  # x y
        return
    kinds = "".join("w" if token.word else "o" if token.kind == "operator" else "?" for token in tokens)
    if variables or not re.fullmatch(r"w+(ow+)+", kinds) or any(token.word in words.ANSWER for token in tokens):
        raise Refused  # -x, x/2, answer - tip


def _read_item(part: _Part, tokens: list[Token], position: int, after_words: bool) -> int:
    """Add the token at a position, or the words from there on, to the part; the next position."""
    token = tokens[position]
    following = tokens[position + 1] if position + 1 < len(tokens) else Token("end", "")
    if not re.search(r"[NMu)]$", part.shape):  # a number must follow
        if token.kind == "number" or token.text == "(":
            return _add(part, token, "N" if token.kind == "number" else "(", position + 1)
        is_sign = token.text in ("+", "-") and not part.shape.endswith("s") and not following.after_space
        if is_sign and (part.items or token.after_space or not after_words):
            return _add(part, token, "s", position + 1)
        raise Refused
    words_after = _words_after(tokens[position:])
    if words_after:
        return _add_words(part, tokens, position, words_after)
    if token.kind == "operator" or token.text == ")":
        return _add(part, token, token.text, position + 1)
    if token.text == "(" and not token.after_space and not part.shape.endswith("u"):  # 2(9)
        return _add(part, replace(token, kind="operator", text="*"), "*", position)
    numerator, slash, denominator = [*tokens[position : position + 3], token, token][:3]
    whole = part.items[-1]
    if (
        part.shape.endswith("N")
        and slash.text == "/"
        and all(each.text.isdigit() for each in (whole, numerator, denominator))
        and numerator.value < denominator.value
    ):
        part.items[-1] = replace(whole, value=whole.value + numerator.value / denominator.value)
        part.shape = part.shape[:-1] + "M"
        return position + 3
    raise Refused


def _add(part: _Part, token: Token, shape: str, position: int) -> int:
    if shape == ")" and part.shape.count(")") >= part.shape.count("("):
        raise Refused
    part.items.append(replace(token, kind="sign") if shape == "s" else token)
    part.shape += shape
    return position


def _words_after(tokens: list[Token]) -> list[Token]:
    """The words, units and remarks at the beginning: "eggs per day", "miles/hour", "% of the total", "cm^2"."""
    taken: list[Token] = []
    for token, following in zip(tokens, [*tokens[1:], Token("end", "")], strict=True):
        previous = taken[-1] if taken else Token("end", "")
        is_unit = (
            (token.text == "/" and following.word)
            or (token.text == "-" and not token.after_space and not following.after_space and following.word)
            or (token.text == "^" and previous.word in words.WITH_POWERS and following.text in ("2", "3"))
            or (previous.text == "^" and token.kind == "number")
        )
        if not is_unit and token.kind not in ("word", "percent", "remark", "comma"):
            break
        taken.append(token)
    return taken


def _add_words(part: _Part, tokens: list[Token], position: int, taken: list[Token]) -> int:
    end = position + len(taken)
    last = taken[-1]
    if sum(token.kind == "percent" for token in taken) > 1:
        raise Refused
    is_percent = any(token.kind == "percent" or token.word == "percent" for token in taken)
    if is_percent and part.items[-1].kind == "number":
        part.items[-1] = replace(part.items[-1], percent=True)
    if last.word == "of" and end < len(tokens) and (is_percent or part.shape.endswith("N/N")):  # 50% of 36
        return _add(part, Token("operator", "*"), "*", end)
    more_numbers = any(token.kind == "number" for token in tokens[end:])
    if more_numbers and any(token.kind == "comma" for token in taken):
        raise Refused
    if end == len(tokens) and last.word in ("a", "an", "the", "of", "and"):
        raise Refused
    check_after(taken, end == len(tokens))
    part.shape += "u"
    part.after += taken
    return end
