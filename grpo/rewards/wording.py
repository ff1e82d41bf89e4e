"""Checks of the words around a number, which raise Refused if they change it or state none.

`grpo.rewards.words` has the lists, docs/grading.md the rule.
"""

from itertools import pairwise

from grpo.rewards import words
from grpo.rewards.lexer import Refused, Token


def check_words(tokens: list[Token]) -> None:
    """Refuse words and marks that change a number, wherever they stand or on their side of the first number."""
    numbers = [index for index, token in enumerate(tokens) if token.kind == "number"]
    if not numbers or words.CHANGING_PHRASE.search(" ".join(token.word for token in tokens)):
        raise Refused
    boundary = Token("end", "")
    neighbours = zip([boundary, *tokens], tokens, [*tokens[1:], boundary], strict=False)
    for index, (previous, token, following) in enumerate(neighbours):
        side = words.CHANGING_BEFORE if index < numbers[0] else words.CHANGING_AFTER
        is_month = token.text == "May" and index > 0
        is_alone = previous.kind == following.kind == "end"
        if (
            (token.word and not is_month and (words.changes_value(token.word) or token.word in side))
            or (token.text == "!" and previous.kind == "number")  # eighteen!
            or (index > numbers[0] and is_alone and is_variable(token))
            or (token.kind == "number" and _word_before_punctuation(tokens[:index]) in words.CHANGING_PREVIOUS)
            or (index > numbers[-1] and previous.kind in ("end", "comma") and _is_second_thought(previous, token))
        ):
            raise Refused


def _is_second_thought(previous: Token, token: Token) -> bool:
    """Whether a sentence or clause begins with this word that may change the last number: 18. Let me see. 18, about."""
    is_sentence = previous.text in (".", ";", "!", "\n") and token.text[:1].isupper()
    return is_sentence or token.word in words.CHANGING_PREVIOUS - words.BEGINS_CLAUSE


def _word_before_punctuation(tokens: list[Token]) -> str:
    """The last word, if only punctuation follows it: "over" of "over:"."""
    index = len(tokens) - 1
    while index >= 0 and tokens[index].kind in ("end", "comma"):
        index -= 1
    return tokens[index].word if 0 <= index < len(tokens) - 1 else ""


def check_before(before: list[Token], rest: list[Token]) -> None:
    """Refuse unless the word in front of the number is one that leaves its value as it is."""
    clause = [token.word for token in before]
    if clause[-1:] in (["a"], ["an"]) and rest[1:] and rest[1].word in words.ORDINAL_ENDINGS:
        raise Refused  # an 18th
    is_name = bool(before) and before[-1].text[:1].isupper()
    clause = clause[len(clause) - clause[::-1].index("") :] if "" in clause else clause  # after a comma or remark
    if clause and rest[0].text == "(" and not rest[0].after_space:
        raise Refused  # f(5)
    check_bound(clause)
    while clause and clause[-1] in words.TRANSPARENT:
        clause.pop()
    if not clause:
        return
    *earlier, word = clause
    previous = earlier[-1] if earlier else ""
    if word == "of":
        allowed = previous in words.BEFORE_OF
    elif word == "to" and previous in ("up", "out"):
        verbs = words.BEFORE_UP_TO if previous == "up" else words.BEFORE_TO
        allowed = bool(earlier[-2:-1]) and earlier[-2] in verbs
    elif word == "to":
        allowed = previous in words.BEFORE_TO
    else:  # is_name, "up": it will cost Ann 18, she picked up 18
        follows_verb = words.is_verb(previous) and (is_name or word in ("up", "out", "away", "back"))
        is_question = previous in ("what", "who", "how")  # what is 18
        allowed = not is_question and (word in words.BEFORE or words.is_verb(word) or follows_verb)
    if not allowed:
        raise Refused


def check_bound(clause: list[str]) -> None:
    """Refuse a bound in front of a total or the like: "under a total of 18", "up to an age of 18"."""
    bound = list(clause)
    while bound and bound[-1] in words.TRANSPARENT | words.BEFORE_OF | {"of", "to"}:
        bound.pop()
    *earlier, word = ["", "", *bound]
    is_up_to = word == "up" and "to" in clause[len(bound) : -1] and earlier[-1] not in words.BEFORE_UP_TO
    if is_up_to or word in words.BOUNDS:
        raise Refused


def check_after(taken: list[Token], at_end: bool) -> None:
    """Refuse words after a number that change it: letters of a formula, scales, "18 and more"."""
    first = taken[0]
    name = first.word
    joined = name and not first.after_space
    if joined and not (name in words.UNITS or len(name) > 3):
        raise Refused
    if name in words.ORDINAL_ENDINGS and not (joined and at_end and len(taken) == 1):
        raise Refused
    second = taken[1].word if len(taken) > 1 else ""
    is_purpose = name == "to" and words.is_verb(second)  # $18 to fill the pool
    if (name in words.CHANGING_NEXT and not is_purpose) or (
        name in ("square", "cubic", "sq", "cu") and not any(t.word for t in taken[1:])
    ):
        raise Refused
    if first.text == "/" and (second.endswith("s") or second in words.NOT_A_DENOMINATOR):
        raise Refused  # 18/people
    _check_statement_about(taken)
    for previous, token in pairwise([Token("end", ""), *taken]):
        starts_unit = (token is first and not is_purpose) or previous.text == "/"
        if is_variable(token) or (starts_unit and len(token.word) == 2 and token.word not in words.UNITS | words.SHORT):
            raise Refused
        if previous.word == "and" and token.word in words.MORE:
            raise Refused
        if previous.text == "-" and token.word.split("-")[0] not in words.AFTER_HYPHEN:
            raise Refused


def _check_statement_about(taken: list[Token]) -> None:
    """Refuse what is said of a number on its own, unless it may confirm it: "18 is the answer", not "18 is dropped"."""
    said = [token.word for token in taken]
    if said[0] not in words.SAYS_OF:
        return
    while said and said[0] in (words.SAYS_OF | words.TRANSPARENT | {"to"}) - words.DETERMINERS:
        del said[0]
    if said and not (said[0] in words.DETERMINERS | words.CONFIRMS or said[0].endswith(("'s", "s'"))):
        raise Refused


def is_variable(token: Token) -> bool:
    """Whether a token is a single letter that is neither a unit nor an English word, or MM (M, K, MM are scales)."""
    is_unit = token.text in "LCFI" or (token.text.islower() and token.text in words.UNITS | words.SHORT)
    return (len(token.word) == 1 and not is_unit) or token.text == "MM"
