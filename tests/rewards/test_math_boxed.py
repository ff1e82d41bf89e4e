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
        (r"\boxed{x^2}", "x^{2}", 2.0),
        (r"\boxed{x^2 - 1}", "(x-1)(x+1)", 0.0),  # only Math-Verify reads formulas
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


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}12\end{pmatrix}", False),
        ("B", r"\text{(B)}", True),
        (r"\textbf{(C)}", r"\text{(B)}", False),
        ("Evelyn", r"\text{Evelyn}", True),
        ("[1,2]", r"x \in [1,2]", True),
        ("(1,2]", r"x \in [1,2]", False),
        ("3", "x = 3", True),
        ("y = 3", "x = 3", False),
        (r"\sqrt3", r"\sqrt{3}", True),
        (r"\sqrt{3x}", r"\sqrt3x", False),
        ("2516_8", "2516_{8}", True),
        ("2516", "2516_8", False),
        (r"\frac12", r"\dfrac{1}{2}", True),
        (r"\frac{12}{3}", r"\frac123", False),
        ("x^{12}", "x^12", False),
    ],
)
def test_only_what_changes_the_looks_is_ignored(one, other, same):
    assert same_latex(one, other) is same
    assert same_latex(other, one) is same


def test_a_complete_box_is_the_format():
    assert boxed_format(["p"] * 3, [r"\boxed{1}", r"\boxed{1", "1"]) == [0.5, 0.0, 0.0]
