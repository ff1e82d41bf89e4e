"""Math-Verify as the judge, in the reward process as in conf/reward/math_verify.yaml."""

import time

import pytest

from grpo.rewards.isolated import RewardProcess


@pytest.fixture(scope="module")
def correctness():
    return RewardProcess().bind("correctness", {"_target_": "grpo.rewards.math_verify.correctness", "timeout_s": 2})


def rewards(correctness, texts, references):
    return correctness(prompts=[""] * len(texts), completions=texts, answer=references)


def test_equivalent_formulas_are_right_and_others_are_wrong(correctness):
    right = [
        (r"\boxed{x^2}", "x^{2}"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{\{1, 2\}}", r"\{2,1\}"),
        (r"\boxed{[0, 1)}", "[0,1)"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        ("<answer>18</answer>", "18"),
        (r"\boxed{1} then \boxed{18}", "18"),
        (r"\boxed{10}", r"10\%"),
        (r"\boxed{18.}", "18"),
        (r"\boxed{(B)}", r"\text{(B)}"),
    ]
    wrong = [
        (r"\boxed{x^3}", "x^{2}"),
        (r"\boxed{(0, 1)}", "[0,1)"),
        (r"\boxed{18} then \boxed{1}", "18"),
        ("The answer is 18", "18"),  # not in a box or a block
        (r"\boxed{9+9}", "18"),
        (r"\boxed{5!}", "120"),
        (r"\boxed{17=18}", "18"),
        (r"\boxed{x=1=y}", r"y"),
        (r"\boxed{2516}", "2516_8"),
        (r"\boxed{}", "18"),
        (r"\boxed{" + "1+" * 400 + "1}", "401"),  # too long to be read
        ("", "18"),
    ]
    texts, references = zip(*right, *wrong, strict=True)
    values = rewards(correctness, list(texts), list(references))
    assert values == [2.0] * len(right) + [0.0] * len(wrong)


def test_a_reference_that_is_no_formula_has_no_value(correctness):
    (value,) = rewards(correctness, [r"\boxed{1}"], [""])
    assert value != value  # NaN: None in the process


def test_a_formula_that_takes_for_ever_is_wrong_after_its_time(correctness):
    started = time.monotonic()
    assert rewards(correctness, [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\pi}"], [r"\pi", r"\pi"]) == [0.0, 2.0]
    assert time.monotonic() - started < 30
