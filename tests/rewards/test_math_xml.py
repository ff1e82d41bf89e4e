"""Tests of the math rewards with tables of expected values, hostile strings, and GSM8K's answer format."""

import math
import random
import time
from fractions import Fraction

import pytest

from grpo.rewards.math_xml import (
    MAX_LENGTH,
    TAGS,
    completion_text,
    correctness,
    extract_answer,
    gsm8k_answer,
    parse_number,
    same_number,
    tag_format,
)


def chat(text):
    return [{"role": "assistant", "content": text}]


def answered(text):
    return f"<reasoning>\nbecause\n</reasoning>\n<answer>\n{text}\n</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # plain numbers
        ("18", 18),
        ("  18\n", 18),
        ("0", 0),
        ("007", 7),
        ("18.0", 18),
        ("18.", 18),
        ("18.50", Fraction(37, 2)),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("123456789012345678901234567890", 123456789012345678901234567890),
        # sign
        ("-3", -3),
        ("+3", 3),
        ("\u22123", -3),
        ("\u20133", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("-$ 5", -5),
        ("-0", 0),
        # thousands
        ("1,234", 1234),
        ("1,234,567.25", Fraction(4938269, 4)),
        ("$1,234.00", 1234),
        ("1234567", 1234567),
        # exponents
        ("1e3", 1000),
        ("1.5E+2", 150),
        ("-25e-2", Fraction(-1, 4)),
        # fractions and mixed numbers
        ("1/2", Fraction(1, 2)),
        ("6 / 4", Fraction(3, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("1,000/3", Fraction(1000, 3)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2 cups", Fraction(-3, 2)),
        ("0/5", 0),
        # units, currency, words, punctuation
        ("18 dollars", 18),
        ("18kg", 18),
        ("18 USD", 18),
        ("18\u20ac", 18),
        ("\u00a3 18", 18),
        ("18\u00a2", 18),
        ("50%", 50),
        ("50 percent", 50),
        ("2 dozen", 2),
        ("18th", 18),
        ("$18/hour", 18),
        ("60 miles / hour", 60),
        ("18-year-old", 18),
        ("The answer is 18.", 18),
        ("She earns $18 every day!", 18),
        ("Answer: 18", 18),
        ("(18)", 18),
        ("#### 18", 18),
        ("\u4e00\u517118\u5143", 18),
        ("18\u00a0dollars", 18),
        # equals signs: the last part, after names and calculations
        ("= 18", 18),
        ("x = 18", 18),
        ("x=-18", -18),
        ("9 + 9 = 18", 18),
        ("9 \u00d7 2 = $18", 18),
        ("total = 9 + 9 = 18 dollars", 18),
        # Markdown and LaTeX
        ("**18**", 18),
        ("The answer is **$18**.", 18),
        ("`18`", 18),
        (r"\boxed{18}", 18),
        (r"$\boxed{1{,}234}$", 1234),
        (r"\boxed{\$18}", 18),
        (r"\$18", 18),
        ("$18$", 18),
        (r"\(18\)", 18),
        (r"\[ x = 18 \]", 18),
        (r"50\%", 50),
        (r"18\text{ dollars}", 18),
        (r"\boxed{18\ \text{dollars}}", 18),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"$\boxed{\frac{3}{4}}$", Fraction(3, 4)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
    ],
)
def test_a_text_that_states_one_number_is_parsed_as_that_number(text, expected):
    assert parse_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        # no number
        "",
        "   ",
        "eighteen",
        "nan",
        "inf",
        "-Infinity",
        "\u221e",
        "$",
        "-",
        ".",
        "=",
        "x = ",
        # more than one number
        "18 or 20",
        "18 18",
        "18 (18)",
        "18-20",
        "18\u201320",
        "18-18",
        "3 hours 20 minutes",
        "5:30",
        "3/4/2020",
        "1.2.3",
        "18 20/5",
        "1 000",
        "18 out of 20",
        # calculations and comparisons
        "9 + 9",
        "2^2",
        "2*2",
        "2**2",
        "4x4",
        "2 \u00d7 3",
        "18 + x",
        "18+",
        "x/2",
        "5 - 3",
        "2\\pi",
        r"\sqrt{16}",
        "\u221a16",
        "\u00b118",
        "x > 18",
        "<18",
        "x != 18",
        "x \u2265 18",
        "18 = 9 + 9",
        "18 = x",
        "x = 18, y = 20",
        "3 eggs + 4 = 7",
        # commas that do not separate thousands
        "1,23",
        "12,34,567",
        "1234,567",
        "1,2345",
        "0,123",
        "1.234,56",
        "18,00",
        # something else changes the value
        "3 million",
        "3million",
        "5 hundredths",
        "18k",
        "$2.5M",
        "minus 3",
        "Negative 3",
        "3 and a half",
        "- 18",
        "--18",
        "-$-5",
        "10\u00b2",
        "1\u00bd",
        "\uff11\uff18",
        "\u0661\u0668",
        "1\u0668",
        # part of a name
        "x2",
        "x-18",
        "Rs.18",
        "...18",
        "1_000",
        # LaTeX that must not join digits, or that is not supported
        r"2\boxed{3}",
        r"\frac{1}{2}3",
        r"1.\frac{1}{2}",
        r"\frac{x}{2}",
        r"\approx 18",
        # out of bounds
        "1/0",
        "0/0",
        "1 1/0",
        r"\frac{1}{0}",
        "1e1001",
        "1e-1001",
        "1e999999999",
        "-1E+99999999999999999999",
        "1e" + "9" * 400,
        "9" * (MAX_LENGTH + 1),
        "9" * 100_000,
    ],
)
def test_a_text_that_does_not_state_one_clear_number_gives_none(text):
    assert parse_number(text) is None


def test_numbers_at_the_bounds_are_exact():
    assert parse_number("1e1000") == 10**1000
    assert parse_number("1e-1000") == Fraction(1, 10**1000)
    assert parse_number("9" * MAX_LENGTH) == 10**MAX_LENGTH - 1
    assert parse_number(" " * 1000 + "18" + "\n" * 1000) == 18


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("$1,234.00", "1234", True),
        ("0.5", "1/2", True),
        ("50%", "50", True),
        ("50%", "0.5", False),
        ("0.3333", "1/3", False),
        ("0.1", "0.10000000000000000555", False),
        ("3", "-3", False),
        ("", "", False),
        ("apple", "apple", False),
    ],
)
def test_same_number(a, b, expected):
    assert same_number(a, b) is expected
    assert same_number(b, a) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>18</answer>", "18"),
        ("<answer>\n 18 \n</answer>", "18"),
        (answered("18"), "18"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer> 3</answer>", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1</answer> </answer>", "1"),
        ("</answer><answer>1</answer>", "1"),
        ("<reasoning><answer>1</answer></reasoning><answer>2</answer>", "2"),
        ("<reasoning><answer>1</answer></reasoning>", "1"),
        ("<answer>2</answer><reasoning><answer>1</answer></reasoning>", "1"),
        ("<answer></answer>", ""),
        ("<answer> \n </answer>", ""),
        ("<answer>1</answer><answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("", None),
        ("18", None),
        ("<answer>18", None),
        ("18</answer>", None),
        ("</answer>18<answer>", None),
        ("<Answer>18</Answer>", None),
        ("<answer >18</answer>", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        (answered("18"), "18", 2.0),
        (answered("18"), " 18\n", 2.0),
        ("<answer>18</answer>", "18", 2.0),
        (answered("Paris"), "Paris", 2.0),
        (answered("18.0"), "18", 1.5),
        (answered("$18"), "18", 1.5),
        (answered("1,234"), "1234", 1.5),
        (answered("50%"), "50", 1.5),
        (answered("9 + 9 = 18"), "18", 1.5),
        (answered("18"), "$18.00", 1.5),
        (answered("19"), "18", 0.0),
        (answered("-18"), "18", 0.0),
        (answered("18 or 20"), "18", 0.0),
        (answered("paris"), "Paris", 0.0),
        (answered("19") + answered("18"), "18", 2.0),
        (answered("18") + answered("19"), "18", 0.0),
        (answered(""), "18", 0.0),
        (answered(""), "", 0.0),
        ("The answer is 18.", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_correctness(completion, reference, expected):
    # As TRL calls the function: with keywords and further columns.
    assert correctness(prompts=[""], completions=[completion], answer=[reference], question=["?"]) == [expected]
    assert correctness(prompts=[""], completions=[chat(completion)], answer=[reference]) == [expected]


def test_the_levels_of_correctness_can_be_set_and_each_completion_gets_one_reward():
    completions = [answered("18"), chat(answered("18.0")), answered("19")]
    assert correctness([""] * 3, completions, ["18"] * 3, exact=1.0, same_number=0.25) == [1.0, 0.25, 0.0]
    assert correctness([], [], []) == []
    with pytest.raises(ValueError):
        correctness([""] * 2, completions[:2], ["18"])


@pytest.mark.parametrize("tag", TAGS)
def test_each_tag_earns_the_tag_reward_once(tag):
    assert tag_format([""], [tag]) == [0.2]
    assert tag_format([""], [chat(f"some {tag} text {tag}")]) == [0.2]
    assert tag_format([""], [tag.upper()]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "tags"),
    [
        ("", 0),
        ("18", 0),
        ("<reasoning >< answer>", 0),
        ("<answer>18</answer>", 2),
        ("<reasoning><answer>18</answer>", 3),
        (answered("18"), 4),
        ("</answer><answer></reasoning><reasoning>", 4),
        (answered("18") * 3, 4),
    ],
)
def test_tag_format(completion, tags):
    assert tag_format(prompts=[""], completions=[completion], answer=["18"]) == pytest.approx([0.2 * tags])
    assert tag_format([""], [completion], tag_reward=0.5) == [0.5 * tags]


def test_completion_text():
    assert completion_text("text") == "text"
    assert completion_text(chat("text")) == "text"
    assert completion_text([]) == ""
    # A tool call has no content, and the tool's answer is not text of the model.
    messages = [
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "<answer>1</answer>"},
        {"role": "assistant", "content": "<answer>2</answer>"},
    ]
    assert completion_text(messages) == "<answer>2</answer>"
    with pytest.raises(TypeError):
        completion_text(None)


@pytest.mark.parametrize(
    ("solution", "expected"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,234,567 ", "1234567"),
        ("#### 1\nno\n#### -2", "-2"),
        ("####5", "5"),
        ("#### 2.50", "2.50"),
        ("#### 1, 2", "1, 2"),
        ("#### 1,23", "1,23"),
    ],
)
def test_gsm8k_answer(solution, expected):
    assert gsm8k_answer(solution) == expected


@pytest.mark.parametrize("solution", ["", "18", "### 18", "18 ####", "####\n"])
def test_a_gsm8k_solution_without_an_answer_is_an_error(solution):
    with pytest.raises(ValueError, match="####"):
        gsm8k_answer(solution)


FRAGMENTS = [
    *TAGS,
    *"0123456789 \n.,:-+*/^=<>#$%{}()[]\\!_`ekx",
    *[
        "\u2212",
        "\u2013",
        "\u20ac",
        "\u00bd",
        "\u00b2",
        "\uff11",
        "\u0661",
        "\u221e",
        "\ud800",
        "\0",
        "\u200b",
        "\u0301",
    ],
    *[
        "1,234",
        "18",
        "1/2",
        "/0",
        "e9999999",
        "1e-99",
        "nan",
        "inf",
        " million",
        "x = ",
        "**",
        "\\boxed{",
        "\\frac{1}{2}",
    ],
    *["\\frac{", "\\text{", "\\$", "{,}", "minus ", "answer"],
]


def test_random_strings_never_raise_and_rewards_stay_in_range():
    random_strings = random.Random(0)
    read = 0
    for _ in range(20_000):
        text = "".join(random_strings.choices(FRAGMENTS, k=random_strings.randint(0, 12)))
        if random_strings.random() < 0.1:
            text = "".join(map(chr, random_strings.choices(range(0x110000), k=20)))
        number = parse_number(text)
        assert number is None or isinstance(number, Fraction)
        read += number is not None
        assert same_number(text, text) == (number is not None)
        for completion in (text, f"<answer>{text}</answer>"):
            for reference in ("18", "1/2", text):
                [reward] = correctness([""], [chat(completion)], [reference])
                assert reward in (0.0, 1.5, 2.0)
            [reward] = tag_format([""], [completion])
            assert 0.0 <= reward <= 0.8
            assert math.isclose(reward / 0.2, round(reward / 0.2), abs_tol=1e-9)
    assert read > 500  # otherwise too few strings contained a number


def test_an_integer_is_parsed_in_every_notation():
    random_integers = random.Random(0)
    for _ in range(500):
        n = random_integers.randint(-(10 ** random_integers.randint(1, 12)), 10 ** random_integers.randint(1, 12))
        for form in (
            "{}",
            "{:,}",
            "{}.00",
            "{:,} dollars",
            "${:,}",
            "x = {}",
            "**{}**",
            "\\boxed{{{}}}",
            "{}e0",
            "{}/1",
        ):
            assert parse_number(form.format(n)) == n, form


HOSTILE = [
    *TAGS,
    *"1-$ *{=.<#",
    *["1,", "1,234", "1 ", "1 1/", "1/", "*a ", "`a", "x=1", "e9", "1e", "#### 1,000", "\u0661"],
    *["\\boxed{", "\\frac{1}{", "\\text{a", "<answer", "<answer></answer>"],
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_long_strings_take_under_a_second(unit):
    for length in (MAX_LENGTH - 2, 100_000):
        text = (unit * length)[:length]
        start = time.perf_counter()
        for variant in (text, f"1{text}!", f"<answer>{text}", f"<answer>{text}</answer>", f"{text}</answer>"):
            parse_number(variant)
            extract_answer(variant)
            correctness([""], [variant], ["18"])
            correctness([""], [answered("18")], [variant])
            tag_format([""], [variant])
            gsm8k_answer(f"####{variant}1")
        assert time.perf_counter() - start < 1.0
