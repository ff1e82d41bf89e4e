import pytest

from grpo.rewards.shaping import length_penalty, overlong_penalty, repetition_penalty, strict_format, tag_order

WHOLE = "<reasoning>1+1</reasoning><answer>2</answer>"


def test_the_strict_format_is_paid_as_a_whole():
    assert strict_format([], [WHOLE, f"{WHOLE}!", WHOLE * 2], value=0.3) == [0.3, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        (WHOLE, 4),
        (f"before {WHOLE} after", 4),
        ("<reasoning>", 1),
        ("<answer>2</answer>", 0),  # the first tag is missing
        ("<reasoning><answer>2</answer></reasoning>", 2),  # the next tag in order comes too late for the third
        ("</reasoning><reasoning>", 1),
        (f"{WHOLE}<answer>2</answer>", 2),
        ("<reasoning><reasoning></reasoning>", 0),
        ("", 0),
    ],
)
def test_tags_count_as_long_as_they_occur_once_and_in_order(text, tags):
    assert tag_order([], [text], tag_reward=1.0) == [tags]


def test_only_right_completions_are_penalized_for_their_length():
    texts = [WHOLE, WHOLE, r"\boxed{2}", WHOLE.replace("2", "3"), "2"]
    ids = [[0] * 10, [0] * 400, [0] * 50, [0] * 50, [0] * 50]
    assert length_penalty([], texts, ids, ["2"] * 5, max_length=100) == [-0.1, -1.0, 0.0, 0.0, 0.0]
    assert length_penalty([], texts, ids, ["2"] * 5, max_length=100, boxed=True) == [0.0, 0.0, -0.5, 0.0, 0.0]


def test_the_overlong_penalty_grows_linearly_in_the_margin():
    """DAPO's numbers: at most 16,384 tokens without a penalty, and 4,096 more with one."""
    ids = [[0] * length for length in (0, 16384, 17408, 20480, 30000)]
    assert overlong_penalty([], [""] * 5, ids, max_length=20480, margin=0.2) == [0.0, 0.0, -0.25, -1.0, -1.0]


def test_the_repetition_penalty_is_the_share_of_repeated_sequences():
    texts = ["a b c d", "a b a b a b", "A b a B", "one", ""]
    # a b a b a b: of 5 pairs (ab ba ab ba ab) 2 are distinct
    assert repetition_penalty([], texts, words=2) == pytest.approx([0.0, -0.6, -1 / 3, 0.0, 0.0])
