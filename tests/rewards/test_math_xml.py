"""Tests of the math rewards with tables of expected values, hostile strings, and GSM8K's answer format."""

import math
import random
import time
from fractions import Fraction

import pytest

from grpo.rewards.math_xml import (
    TAGS,
    completion_text,
    correctness,
    extract_answer,
    gsm8k_answer,
    parse_number,
    same_number,
    tag_format,
)
from grpo.rewards.number import MAX_LENGTH


def chat(text):
    return [{"role": "assistant", "content": text}]


def answered(text):
    return f"<reasoning>\nbecause\n</reasoning>\n<answer>\n{text}\n</answer>"


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
        ("#### 18\nChecked twice.", "18"),
        ("#### 1,234 \r\n\nSource: 7 books", "1234"),
        ("#### 18\u20285", "18"),
        ("#### 1,23", "1,23"),
    ],
)
def test_gsm8k_answer(solution, expected):
    assert gsm8k_answer(solution) == expected


@pytest.mark.parametrize("solution", ["", "18", "### 18", "18 ####", "####\n", "#### \n18"])
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
    for _ in range(8_000):
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
    assert read > 200  # otherwise too few strings contained a number


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
