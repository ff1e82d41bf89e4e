import math

import pytest

from grpo.algorithm.reward import Component, RewardError, score

REPLIES = [[{"role": "assistant", "content": text}] for text in ("a", "bb")]


def run(*components, **columns):
    return score(list(components), ["p", "p"], REPLIES, columns)


def test_components_are_kept_apart_and_summed_by_weight():
    rewards = run(
        Component("correctness", lambda completions, **_: [2.0, 0.0]),
        Component("format", lambda completions, **_: [0.2, 0.8], weight=0.5),
    )
    assert rewards.components["correctness"].tolist() == [2.0, 0.0]
    assert rewards.components["format"].tolist() == [0.2, 0.8]
    assert rewards.total.tolist() == [2.1, 0.4]


def test_none_means_missing_and_adds_nothing():
    rewards = run(Component("a", lambda completions: [None, 1.0]), Component("b", lambda completions: [0.5, 0.5]))
    assert math.isnan(rewards.components["a"][0])
    assert rewards.total.tolist() == [0.5, 1.5]


def test_a_function_gets_the_columns_that_it_names():
    def by_answer(completions, answer):
        return [float(c[0]["content"] == a) for c, a in zip(completions, answer, strict=True)]

    rewards = run(Component("c", by_answer), answer=["a", "x"], other=[1, 2])
    assert rewards.total.tolist() == [1.0, 0.0]


def test_a_column_named_completions_does_not_stand_in_for_the_models_own():
    rewards = run(Component("c", lambda completions, **_: [float(len(completions))] * 2), completions=["x"] * 9)
    assert rewards.total.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions: None, "returned NoneType"),
        (lambda completions: [1.0], "returned 1 values for 2 completions"),
        (lambda completions: [1.0, math.nan], "returned nan"),
        (lambda completions: [1.0, math.inf], "returned inf"),
        (lambda completions: [1.0, "x"], "returned 'x'"),
    ],
)
def test_a_function_that_breaks_its_contract_is_named_with_the_reason(function, reason):
    with pytest.raises(RewardError, match=f"'mine' {reason}"):
        run(Component("mine", function))


def test_rewards_written_for_trl_work_unchanged():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    replies = [[{"role": "assistant", "content": "<think>\nx\n</think>\n18"}], [{"role": "assistant", "content": "18"}]]
    components = [Component("think", think_format_reward), Component("overlong", get_soft_overlong_punishment(10, 5))]
    rewards = score(components, ["p", "p"], replies, {"completion_ids": [[1] * 4, [1] * 12], "answer": ["18", "18"]})
    assert rewards.components["think"].tolist() == [1.0, 0.0]
    assert rewards.components["overlong"].tolist() == [0.0, -1.0]
