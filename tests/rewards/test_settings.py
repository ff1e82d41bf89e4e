"""Settings of the suite's reward functions, checked before a model is loaded."""

import pytest

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.instantiate import bind_reward
from grpo.rewards.scoring import settings_of
from grpo.training.experiment import bind_rewards
from tests.launches import launch

SHAPING = "grpo.rewards.shaping."


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"_target_": SHAPING + "overlong_penalty", "max_length": 9, "margin": 2},
            "margin=2: must be above 0 and at mo",
        ),
        ({"_target_": SHAPING + "overlong_penalty", "max_length": 0}, "max_length=0: must be at least 1"),
        ({"_target_": SHAPING + "overlong_penalty", "max_length": "abc"}, "max_length=abc: must be an integer"),
        ({"_target_": SHAPING + "overlong_penalty", "max_length": True}, "max_length=True: must be an integer"),
        ({"_target_": SHAPING + "length_penalty", "max_length": -1}, "max_length=-1: must be at least 1"),
        ({"_target_": SHAPING + "length_penalty", "max_length": 9, "boxed": 1}, "boxed=1: must be true or false"),
        ({"_target_": SHAPING + "repetition_penalty", "words": 0}, "words=0: must be at least 1"),
        ({"_target_": SHAPING + "repetition_penalty", "words": 2.5}, "words=2.5: must be an integer"),
        ({"_target_": SHAPING + "strict_format", "value": [1]}, r"value=\[1\]: must be a number"),
        ({"_target_": SHAPING + "tag_order", "tag_reward": "x"}, "tag_reward=x: must be a number"),
        ({"_target_": "grpo.rewards.math_xml.correctness", "exact": None}, "exact=None: must be a number"),
        ({"_target_": "grpo.rewards.math_boxed.boxed_format", "value": float("inf")}, "value=inf: must be a number"),
    ],
)
def test_a_setting_that_a_function_cannot_use_is_refused(node, message):
    with pytest.raises(ConfigError, match=f"^reward.components.mine.{message}"):
        bind_reward("reward.components.mine", node)


@pytest.mark.parametrize("reward", ["math_xml", "math_boxed", "math_xml_strict", "math_xml_short", "math_xml_varied"])
def test_the_rewards_of_the_suite_pass(reward):
    config = typed(compose_config(["experiment=quickstart", f"reward={reward}"]))
    assert bind_rewards(config)[0]


@pytest.mark.parametrize(
    "target",
    [
        "math_xml.extract_answer",
        "math_xml.same_number",
        "math_xml.gsm8k_answer",
        "number.parse_number",
        "isolated.RewardProcess",
    ],
)
def test_another_function_of_the_suite_is_refused_for_its_form(target):
    with pytest.raises(ConfigError, match="it must have the form"):
        bind_reward("reward.components.mine", {"_target_": f"grpo.rewards.{target}"})


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_what_the_run_gives_cannot_be_a_setting(name):
    with pytest.raises(ConfigError, match="are given by the run; remove the setting"):
        bind_reward("reward.components.mine", {"_target_": SHAPING + "overlong_penalty", "max_length": 9, name: 5})


def test_a_column_given_as_a_setting_is_not_mistaken_for_a_wrong_value():
    function = bind_reward("reward.components.mine", {"_target_": "grpo.rewards.math_xml.correctness", "answer": "5"})
    assert settings_of(function) == {"answer": "5"}


def test_a_function_of_the_user_may_take_any_settings():
    node = {"_target_": "tests.rewards.test_settings.any_settings", "number": "seven"}
    assert bind_reward("reward.components.mine", node)(completions=["x", "y"]) == ["seven", "seven"]


def any_settings(completions, *, number: float, **columns):
    return [number for _ in completions]


def test_a_launch_is_refused_before_it_leaves_anything(tmp_path):
    wrong = ["reward=math_xml_overlong", "reward.components.overlong.margin=2", "preflight=false"]
    done = launch("experiment=quickstart", *wrong, "tracking=disabled", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: reward.components.overlong.margin=2: must be above 0 and at most 1" in done.stderr
    assert not list(tmp_path.iterdir())
