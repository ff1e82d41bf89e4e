"""The answer that a completion ends with, with or without tags, and the graders of an evaluation."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.lenient import final_answer, last_boxed, last_number, lenient
from grpo.rewards.math_xml import accuracy, strict, well_formed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She sells 9 eggs for $2 each, so she makes 9 * 2 = 18 dollars.", 18),
        ("The answer is 1,234.50.", Fraction(2469, 2)),
        ("It is -5.", -5),
        ("It is $-5", -5),
        ("10-5", 5),  # not -5
        ("about 3/4 of a cup", Fraction(3, 4)),
        (r"so \frac{3}{4}", Fraction(3, 4)),
        (r"1{,}234", 1234),
        ("a probability of .5", Fraction(1, 2)),
        ("18%", 18),
        (r"\boxed{\frac{1}{2}} as there are 2 coins", Fraction(1, 2)),
        (r"First \boxed{3}, then \boxed{4}. These are 5 words.", 4),
        (r"\boxed{x^{2}} for x = 3", 3),  # the box states no number
        ("The total is 5.\n#### 1,000\nThat was step 3.", 1000),
        ("<answer>18</answer> or 20", 18),  # what is inside the tags is the answer
        ("<answer>18 per 2 eggs</answer>", 2),  # which states no single number
        ("<answer>cat</answer>", "cat"),
        ("There is no number here.", None),
        ("", None),
        ("1/0", None),
    ],
)
def test_the_final_answer_is_that_of_the_tags_the_box_the_mark_or_the_last_number(text, expected):
    assert final_answer(text) == expected


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["It is {}.", "{}", "x = 3, y = {}", "**{}**", "${}$", "is {} eggs"])
)
def test_the_last_number_is_read_exactly(value, form):
    assert last_number(form.format(value)) == value
    assert last_number(form.format(f"{value:,}")) == value


@given(st.text(max_size=300))
def test_any_text_has_an_answer_of_a_known_kind_or_none(text):
    for each in (text, f"\\boxed{{{text}", f"<answer>{text}</answer>", "9" * 5000 + text, "9" + ",999" * 5000 + text):
        found = final_answer(each)
        assert found is None or isinstance(found, Fraction) or (isinstance(found, str) and found in each)
    assert last_number(f"{text} = 7") == 7


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["<answer>{}</answer>", "{}", r"\boxed{{{}}}"]))
def test_another_number_is_never_right(value, other, form):
    given_values = lenient([], [form.format(value)], [str(other)])
    assert given_values == [float(value == other)]


@pytest.mark.parametrize("reference", ["cat", "(3, 4)", "x^2 + 1", "2:30"])
def test_a_text_inside_the_tags_or_a_box_that_is_the_reference_is_right(reference):
    texts = [f"I count 2 legs. <answer>{reference}</answer>", f"so \\boxed{{{reference}}} in 3 steps", "2 legs"]
    assert lenient([], texts, [reference] * 3) == [1.0, 1.0, 0.0]


def test_a_box_can_have_nested_braces_and_must_be_complete():
    assert last_boxed(r"\boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_boxed("no box") is None


def test_a_box_counts_only_if_the_answer_block_states_no_number():
    assert lenient([], [r"First \boxed{18}, no: <answer>17</answer>"], ["18"]) == [0.0]
    assert lenient([], [r"\boxed{x^{2}} <answer></answer>"], ["x^{2}"]) == [1.0]
    assert lenient([], [r"\boxed{x^{2}} for x = 3"], ["x^{2}"]) == [1.0]


def test_the_graders_are_ordered_from_strict_to_lenient():
    texts = {
        "<reasoning>9 * 2</reasoning>\n<answer>18</answer>": (1, 1, 1, 1),
        "<reasoning>9 * 2</reasoning>\n<answer>$18</answer>": (0, 1, 1, 1),
        "<answer>18.0</answer>": (0, 1, 1, 0),
        "The answer is 18.": (0, 0, 1, 0),
        "\uff11\uff18": (0, 0, 0, 0),
        "It is \u221218.": (0, 0, 0, 0),
        "<reasoning>a</reasoning><answer>19</answer>": (0, 0, 0, 1),
        "<answer>1</answer><reasoning>a</reasoning><answer>18</answer>": (1, 1, 1, 0),
        "Well: <reasoning>a</reasoning><answer>18</answer>": (1, 1, 1, 0),
    }
    graders = (strict, accuracy, lenient, well_formed)
    found = zip(
        *(grade(prompts=[], completions=[*texts], answer=["18"] * len(texts)) for grade in graders), strict=True
    )
    assert [*found] == [*texts.values()]
