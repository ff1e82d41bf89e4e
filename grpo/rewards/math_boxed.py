r"""Rewards for maths answers written as ``\boxed{...}``, the form of MATH (Hendrycks et al., arXiv 2103.03874).

Each function has TRL's form ``f(prompts, completions, **columns) -> list[float]``. No completion makes them raise or
hang.
"""

import re
from collections.abc import Sequence

from grpo.rewards.lenient import last_boxed
from grpo.rewards.math_xml import Completion, completion_text, grade

# What only changes how LaTeX looks
_SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\!")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|[\s~])+")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{([^{}]*)\}")
_ONE_ARGUMENT = re.compile(r"(\\sqrt|\\frac|\^|_|(?<=\\frac[0-9a-zA-Z])|(?<=\}))\{([0-9a-zA-Z])\}")
_MEMBER = re.compile(r"^[a-zA-Z]\s*(?:\\in(?![a-zA-Z])|=)\s*")
_CHOICE = re.compile(r"\(([A-Za-z])\)")
# A space between digits, or after a letter, has a meaning: "1 8" is not 18, and "\sin x" is not "\sinx".
_IDLE_SPACE = re.compile(r"(?<![0-9A-Za-z])[ ]|[ ](?![0-9A-Za-z])|(?<=[0-9])[ ](?=[A-Za-z])")


def same_latex(a: str, b: str) -> bool:
    r"""Whether both texts are the same formula, apart from spacing and the size of brackets and fractions.

    One of them may have a name in front of it, as in ``x = 3`` and ``x \in [1, 2]``.
    """
    one, other = plain_latex(a), plain_latex(b)
    return one == other or _MEMBER.sub("", one) == other or one == _MEMBER.sub("", other)


def plain_latex(text: str) -> str:
    """A formula without what only changes its looks: spacing, sizes of brackets, braces around one character."""
    text = text.strip().removesuffix(".").strip("$")
    text = _FRACTION.sub(r"\\frac", _SIZES.sub("", text))
    text = _TEXT.sub(r"\1", text)
    text = _IDLE_SPACE.sub("", _SPACE.sub(" ", text))
    text = _ONE_ARGUMENT.sub(r"\1\2", text)
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text


def correctness(
    prompts: Sequence,
    completions: Sequence[Completion],
    answer: Sequence[str],
    *,
    exact: float = 2.0,
    same_number: float = 1.5,
    **columns: object,
) -> list[float]:
    r"""The correctness reward of each completion, based on its last complete ``\boxed{...}``.

    `exact` if its content is the formula of the reference (`same_latex`), `same_number` if it is the same number
    written differently (`grpo.rewards.number.parse_number`), else 0.0. `answer` has one reference per completion;
    `prompts` and other columns are not used.
    """
    rewards = {"exact": exact, "same_number": same_number, "wrong": 0.0}
    pairs = zip(completions, answer, strict=True)
    return [rewards[grade(last_boxed(completion_text(each)), reference, same_latex)] for each, reference in pairs]


def accuracy(
    prompts: Sequence, completions: Sequence[Completion], answer: Sequence[str], **columns: object
) -> list[float]:
    """1.0 for each completion whose boxed answer is right, else 0.0; its mean is the accuracy."""
    return correctness(prompts, completions, answer, exact=1.0, same_number=1.0)


def boxed_format(
    prompts: Sequence, completions: Sequence[Completion], *, value: float = 0.5, **columns: object
) -> list[float]:
    r"""`value` for each completion with a complete ``\boxed{...}`` that is not empty, else 0.0."""
    return [value if last_boxed(completion_text(each)) else 0.0 for each in completions]
