"""The category of a wrong completion."""

import time
from fractions import Fraction

import pytest

from grpo.analysis.wrong_answers import CATEGORIES, equations, why_wrong
from grpo.rewards.lenient import final_answer


@pytest.mark.parametrize(
    ("completion", "truncated", "expected"),
    [
        ("<reasoning>9 * 2 = 18</reasoning><answer>18</answer>", False, None),
        ("9 * 2 = 18, so she makes 18 dollars.", False, "right elsewhere"),
        ("<reasoning>9 * 2 = 18</reasoning><answer>9</answer>", False, "right elsewhere"),
        ("The answer is 18.", False, "right elsewhere"),
        ("<reasoning>First she eats", True, "truncated"),
        ("I do not know.", False, "no answer tag"),
        ("<reasoning>9 * 2 = 17</reasoning><answer>17</answer>", False, "arithmetic slip"),
        ("<reasoning>9 x $2 = $17</reasoning><answer>17</answer>", False, "arithmetic slip"),
        ("<reasoning>16 - 3 = 13</reasoning><answer>13</answer>", False, "other"),
        ("<reasoning>10 / 3 = 3.33</reasoning><answer>3</answer>", False, "other"),  # rounded
        ("<reasoning>1000 * 3 = 3010</reasoning><answer>3010</answer>", False, "arithmetic slip"),  # no rounding
        ("<reasoning>2000 / 3 = 667</reasoning><answer>667</answer>", False, "other"),
        ("<reasoning>9 + 8 = 18, 18 - 1 = 17</reasoning><answer>17</answer>", False, "arithmetic slip"),
        ("<answer></answer>", False, "other"),
        ("<reasoning>-3 + 5 = 2, (5+3) / 2 + 1 = 5, 2^3 + 1 = 9</reasoning><answer>9</answer>", False, "other"),
        ("<reasoning>200 / 50% = 400, x + 2 + 3 = 10</reasoning><answer>9</answer>", False, "other"),
    ],
)
def test_a_wrong_completion_is_in_the_first_category_that_holds(completion, truncated, expected):
    correct = expected is None
    row = {"completion": completion, "answer": "18", "correct": correct, "truncated": truncated}
    assert why_wrong(row) == expected
    assert expected is None or expected in CATEGORIES


def test_a_completion_that_was_not_graded_has_no_category():
    assert why_wrong({"completion": "x", "answer": "18", "correct": None}) is None


def test_long_texts_take_no_noticeable_time():
    started = time.perf_counter()
    assert [*equations("1+" * 20_000)] == []
    assert [*equations("1" + ",000" * 20_000)] == []
    assert final_answer("\\boxed{" * 5000) is None
    assert time.perf_counter() - started < 5


def test_equations_are_read_with_currency_commas_and_per_cent():
    text = "3 + 4 = 7 and 7 * 2 = 14; $1,000 - $250 = $750; 50% * 36 = 18; 1/0 = 5; x + 2 = 4; 2 + 2 = 5."
    assert [*equations(text)] == [(7, 7), (14, 14), (750, 750), (18, 18), (4, 5)]
    assert [*equations("1/4 = 25%")] == [(Fraction(1, 4), Fraction(1, 4))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 12\n- 3 + 4 = 7", [(7, 7)]),
        ("* 3 + 4 = 7\n2) 2 + 2 = 5\n(3) 1 + 1 = 2\n4. 5 - 1 = 4", [(7, 7), (4, 5), (2, 2), (4, 4)]),
        ("-3 + 4 = 1, then 2 + 2 = 4", [(4, 4)]),
        ("The max 3 + 4 = 7", [(7, 7)]),
        ("5 x 3 + 4 = 19", [(19, 19)]),
        ("(2 + 3) x 3 + 4 = 19", []),
        ("3 + 4\n= 7", []),
        ("5 apples x 2 + 3 = 13 and n x 2 + 3 = 13", []),
        ("12\n+ 3 + 4 = 19", []),
        ("- 5 + 3 = -2", [(-2, -2)]),
        ("- 5 + 3 = 9", [(8, 9)]),
    ],
)
def test_equations_are_read_line_by_line_and_only_whole(text, found):
    assert [*equations(text)] == found
