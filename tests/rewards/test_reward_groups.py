"""The files of conf/reward/: each of them trains, and right answers in its form get the most."""

import pytest

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.paths import CONF_DIR
from grpo.rewards.isolated import isolated_functions
from grpo.rewards.scoring import score
from grpo.training.experiment import bind_rewards

NAMES = sorted(file.stem for file in (CONF_DIR / "reward").glob("*.yaml"))
IN_TAGS = "<reasoning>9 + 9 = 18</reasoning>\n<answer>{}</answer>"
IN_BOX = r"9 + 9 = 18, so \boxed{{{}}}"
METADATA = {"source_dataset": "chain_sum", "difficulty": {}}


def config_of(name):
    return typed(compose_config([f"reward={name}", "experiment=quickstart"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_gets_the_most_and_a_wrong_one_is_not_paid_for_correctness(name):
    config = config_of(name)
    components, accuracy, _ = bind_rewards(config)
    form = IN_BOX if name in ("math_boxed", "math_verify") else IN_TAGS
    texts = [form.format("18"), form.format("17"), "The answer is 18."]
    columns = {
        "id": ["1", "2", "3"],
        "question": ["What is 9 + 9?"] * 3,
        "answer": ["18"] * 3,
        "metadata": [METADATA] * 3,
        "completion_ids": [[1] * 30] * 3,
    }
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = score(components, [[]] * 3, completions, columns)
    right, wrong, unformatted = rewards.total.tolist()
    assert right > wrong > unformatted or name == "math_xml_overlong"
    assert rewards.components["correctness"].tolist() == [2.0, 0.0, 0.0]
    assert score([accuracy], [[]] * 3, completions, columns).total.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_the_declared_ranges_hold(name):
    config = config_of(name)
    components, _, _ = bind_rewards(config)
    texts = [IN_TAGS.format("18"), IN_BOX.format("18.0"), "", "a b " * 200, IN_TAGS.format("18") * 2]
    count = len(texts)
    columns = {
        "question": ["What is 9 + 9?"] * count,
        "answer": ["18"] * count,
        "metadata": [METADATA] * count,
        "completion_ids": [[1] * length for length in (1, 30, 40, 400, 4000)],
    }
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    values = score(components, [[]] * count, completions, columns).components
    for component, node in config.reward.components.items():
        lowest, highest = node["range"]
        assert lowest <= values[component].min() <= values[component].max() <= highest


def test_what_can_hang_is_isolated():
    isolated = {name: list(isolated_functions(config_of(name))) for name in NAMES}
    both = ["reward.components.correctness", "eval.accuracy"]
    assert {name: keys for name, keys in isolated.items() if keys} == {"math_verify": both, "reasoning_gym": both}


def test_a_reward_for_boxes_asks_for_them():
    for name in ("math_boxed", "math_verify"):
        assert r"\boxed" in compose_config([f"reward={name}"]).data.system_prompt
