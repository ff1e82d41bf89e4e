import pytest

from grpo.rewards.math_boxed import accuracy, boxed_format, correctness, same_latex


def reward(text, answer):
    return correctness(["p"], [[{"role": "assistant", "content": text}]], [answer])[0]


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        (r"so \boxed{18}.", "18", 2.0),
        (r"so \boxed{18.0}.", "18", 1.5),
        (r"\boxed{1} or rather \boxed{18}", "18", 2.0),
        (r"\boxed{18} or rather \boxed{1}", "18", 0.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 2.0),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 2.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.5),
        (r"\boxed{ \left( 1,\ 2 \right) }", "(1,2)", 2.0),
        (r"\boxed{(1,2]}", "(1,2)", 0.0),
        (r"\boxed{x^2}", "x^{2}", 0.0),  # the same to a reader, but only Math-Verify reads formulas
        (r"\boxed{}", "18", 0.0),
        (r"\boxed{18", "18", 0.0),
        ("18", "18", 0.0),
        ("<answer>18</answer>", "18", 0.0),
        (r"\boxed{-18}", "18", 0.0),
        (r"\boxed{18} ", "-18", 0.0),
        (r"\boxed{1 8}", "18", 0.0),
        (r"\boxed{1\ 8}", "18", 0.0),
    ],
)
def test_the_last_box_is_graded(text, answer, value):
    assert reward(text, answer) == value
    assert accuracy(["p"], [text], [answer]) == [float(value > 0)]


def test_spacing_between_digits_and_letters_makes_another_formula():
    assert same_latex(r"2 x + 1", "2x+1")
    assert not same_latex("1 2", "12")
    assert not same_latex(r"\sin x", r"\sinx")
    assert same_latex(r"\sin (x)", r"\sin(x)")


def test_a_complete_box_is_the_format():
    assert boxed_format(["p"] * 3, [r"\boxed{1}", r"\boxed{1", "1"]) == [0.5, 0.0, 0.0]
