"""From a `_target_` to its function, and which targets a run folder may name."""

import sys
import textwrap

import pytest
import yaml
from omegaconf import OmegaConf

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.instantiate import bind, bind_reward
from grpo.config.migrations import load_frozen
from grpo.config.trust import check_trusted
from grpo.config.values import to_dict


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user, my_functions, which Python can import."""
    (tmp_path / "my_functions.py").write_text(
        textwrap.dedent(
            """
            def brief(completions, scale=1.0, **kwargs):
                return [-scale * len(completion[0]["content"]) for completion in completions]

            def keyword_free(completions, answer):
                return [float(text == answer) for text in completions]

            def leave_a_trace(path):
                open(path, "w").close()

            def no_reward(path):
                return path

            not_a_function = 3
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_target_is_resolved_to_its_function_with_the_settings_of_the_node(own_module):
    function = bind_reward("reward.components.brief", {"_target_": "my_functions.brief", "scale": 2.0, "weight": 9.0})
    assert function(prompts=["?"], completions=[[{"content": "four"}], [{"content": ""}]]) == [-8.0, 0.0]


def test_the_keys_listed_in_without_are_not_passed_to_the_function():
    node = {"_target_": "builtins.dict", "lr": 1.0, "system_prompt": "x"}
    assert bind("data", node, without=("system_prompt",))() == {"lr": 1.0}


def test_a_reward_function_of_trl_is_bound_unchanged():
    from trl.rewards import think_format_reward

    node = {"_target_": "trl.rewards.think_format_reward", "weight": 0.5}
    completions = [[{"content": "<think>\n2 + 2\n</think>\n4"}], [{"content": "4"}]]
    assert bind_reward("reward.components.think", node)(completions=completions) == [1.0, 0.0]
    assert think_format_reward(completions) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"_target_": "os.system"}, "Hydra refuses to run this"),
        ({"_target_": "builtins.eval"}, "Hydra refuses to run this"),
        ({"_target_": "no_such_module.f"}, "No module named 'no_such_module'"),
        ({"_target_": "grpo.algorithm.objective.no_such_loss"}, "no_such_loss"),
        ({"_target_": "my_functions.not_a_function"}, "callable"),
        ({"_target_": "grpo"}, "callable"),
    ],
)
def test_a_target_that_cannot_be_run_is_refused_with_its_key_and_the_reason(own_module, node, reason):
    with pytest.raises(ConfigError) as refused:
        bind("objective", node)
    assert str(refused.value).startswith(f"objective._target_={node['_target_']}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_setting_that_the_function_does_not_take_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"optimizer: .*'momentum'"):
        bind("optimizer", {"_target_": "torch.optim.AdamW", "lr": 1e-3, "momentum": 0.9})
    with pytest.raises(ConfigError, match=r"data: load_arithmetic\(\) .*'split'"):
        bind("data", {"_target_": "grpo.data.problems.load_arithmetic", "split": "train"})


def test_a_reward_function_with_another_signature_is_refused(own_module):
    with pytest.raises(ConfigError, match=r"f\(prompts, completions, \*\*columns\) -> list of numbers"):
        bind_reward("reward.components.x", {"_target_": "my_functions.no_reward"})
    assert bind_reward("reward.components.x", {"_target_": "my_functions.keyword_free"})


PAYLOADS = [
    "${oc.create:{_target_: my_functions.leave_a_trace, path: trace}}",
    "${oc.env:HOME}",
    "${oc.decode:'[1, 2]'}",
    "\\${oc.env:HOME}",
    "\\\\${oc.env:HOME}",
    {"deep": [{"er": "${oc.create:{_target_: my_functions.leave_a_trace, path: trace}}"}]},
    ["${oc.env:HOME}", {"a": "${scale}"}],
    "${",
    None,
]


@pytest.mark.parametrize("setting", PAYLOADS, ids=str)
def test_settings_reach_the_function_as_written(own_module, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    node = {"_target_": "builtins.dict", "tags": setting, "scale": 1}
    assert bind("data", node)() == {"tags": setting, "scale": 1}
    assert not (tmp_path / "trace").exists()


def test_an_escaped_interpolation_reaches_the_function_as_literal_text(tmp_path):
    composed = compose_config(["+reward.components.x={_target_: builtins.dict, pattern: '\\${x}'}"])
    assert bind("x", typed(composed).reward.components["x"])()["pattern"] == "${x}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(typed(composed))))
    reread = typed(load_frozen(tmp_path / "config.yaml"))
    assert bind("x", reread.reward.components["x"])()["pattern"] == "${x}"


@pytest.mark.parametrize("name", ["_target_", "_args_", "_partial_", "_recursive_", "_convert_"])
def test_settings_with_instantiation_keys_of_hydra_are_refused(own_module, name):
    order = {name: ["my_functions.leave_a_trace"]}
    for node in ({"a": {"b": order}}, {"a": [[order]]}, order):
        with pytest.raises(ConfigError, match=rf"^objective\..*{name}"):
            bind("objective", {"_target_": "builtins.dict"} | node)


@pytest.mark.parametrize("target", ["${oc.env:HOME}", {"_target_": "my_functions.brief"}, ["x"], 3, None])
def test_a_target_must_be_text_and_is_not_interpolated(own_module, target):
    with pytest.raises(ConfigError, match=r"objective\._target_=.*must be the dotted path of a function"):
        bind("objective", {"_target_": target})


# Trust. `frozen` makes the config of a run folder; `composed` is the config from conf/ and the command line.


def frozen(target, **more):
    return OmegaConf.create({"objective": {"_target_": target, **more}})


@pytest.fixture(scope="module")
def composed():
    return compose_config([])


@pytest.mark.parametrize(
    "target",
    [
        "my_functions.brief",
        "subprocess.check_output",
        "os.system",
        "torch.load",
        "grpo.runs.folder.shutil.rmtree",
        "grpo.runs.checkpoint.shutil.rmtree",
        "grpo.launch.session.signal.raise_signal",
        "grpo.config.instantiate.instantiate",
        "grpo.config.compose.sys.exit",
        "torch.optim.adamw.torch.load",
        "torch.optim.optimizer.functools.partial",
        "grpo",
        "grpofake.f",
    ],
)
def test_a_target_that_only_the_folder_names_is_refused_with_the_argument_that_allows_it(composed, target):
    with pytest.raises(ConfigError) as refused:
        check_trusted(frozen(target), composed, "outputs/theirs")
    text = str(refused.value)
    assert text.startswith(f"outputs/theirs asks to run {target} (objective._target_)")
    assert text.endswith(f"add: objective._target_={target}")


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("objective", "grpo.algorithm.objective.Objective"),
        ("data", "grpo.data.problems.load_arithmetic"),
        ("optimizer", "torch.optim.SGD"),
        ("optimizer", "grpo.algorithm.optimizer.MuonWithAdamW"),
        ("rollout", "grpo.rollout.native.NativeEngine"),
    ],
)
def test_functions_of_the_suite_and_torch_optimizers_are_trusted(composed, group, target):
    check_trusted(OmegaConf.create({group: {"_target_": target}}), composed, "outputs/theirs")


def test_rewards_of_the_suite_are_trusted_under_any_name(composed):
    for target in ("grpo.rewards.math_xml.accuracy", "grpo.rewards.math_xml.correctness"):
        theirs = {"reward": {"components": {"mine": {"_target_": target}}}}
        check_trusted(OmegaConf.create(theirs), composed, "outputs/theirs")


def test_scorers_that_run_data_as_code_are_trusted_only_if_the_command_line_names_them(composed):
    target = "grpo.rewards.reasoning_gym.score"
    theirs = OmegaConf.create({"reward": {"components": {"correctness": {"_target_": target}}}})
    with pytest.raises(ConfigError, match=r"asks to run grpo.rewards.reasoning_gym.score .*if you trust it, add: "):
        check_trusted(theirs, composed, "outputs/theirs")
    check_trusted(theirs, compose_config(["reward=reasoning_gym"]), "outputs/theirs")


@pytest.mark.parametrize(
    ("key", "target"),
    [
        # These functions resolve dotted paths in their settings, so only their own key may name them.
        ("reward.components.x", "grpo.algorithm.objective.Objective"),
        ("eval.accuracy", "grpo.algorithm.objective.Objective"),
        ("data", "grpo.algorithm.objective.choose"),
        ("optimizer", "grpo.algorithm.objective.choose"),
        ("rollout", "grpo.algorithm.objective.Objective"),
        ("objective", "grpo.algorithm.objective.choose"),
        ("objective", "grpo.data.problems.load_jsonl"),
        ("data", "torch.optim.SGD"),
        ("parent", "torch.optim.SGD"),
    ],
)
def test_a_function_trusted_under_one_key_is_not_trusted_under_another(composed, key, target):
    theirs = OmegaConf.create({})
    OmegaConf.update(theirs, f"{key}._target_", target)
    with pytest.raises(ConfigError, match=rf"asks to run {target} \({key}\._target_\)"):
        check_trusted(theirs, composed, "outputs/theirs")


@pytest.mark.parametrize("target", [["os.system"], {"a": "os.system"}, 5])
def test_a_target_that_is_not_text_is_refused_in_one_line(composed, target):
    with pytest.raises(ConfigError, match=r"asks to run .* \(data\._target_\)"):
        check_trusted(OmegaConf.create({"data": {"_target_": target}}), composed, "outputs/theirs")


def test_a_function_path_as_a_choice_of_the_objective_is_trusted_only_from_the_command_line(composed):
    with pytest.raises(ConfigError, match=r"asks to run os\.getcwd \(objective\.ratio\)"):
        check_trusted(OmegaConf.create({"objective": {"ratio": "os.getcwd"}}), composed, "outputs/theirs")
    named = compose_config(["objective.ratio=my_functions.ratio"])
    check_trusted(OmegaConf.create({"objective": {"ratio": "my_functions.ratio"}}), named, "outputs/theirs")


def test_a_target_named_on_the_command_line_is_trusted():
    named = compose_config(["objective._target_=my_functions.loss"])
    check_trusted(frozen("my_functions.loss"), named, "outputs/theirs")
    with pytest.raises(ConfigError, match=r"my_functions\.other"):
        check_trusted(frozen("my_functions.other"), named, "outputs/theirs")


@pytest.mark.parametrize(
    "hidden",
    [
        {"callback": {"_target_": "subprocess.check_output"}},
        {"callbacks": [{"_target_": "subprocess.check_output"}]},
        {"deep": [[{"a": [{"_target_": "subprocess.check_output"}]}]]},
    ],
)
def test_a_target_inside_the_settings_of_another_one_is_refused(composed, hidden):
    with pytest.raises(ConfigError, match=r"subprocess\.check_output"):
        check_trusted(frozen("grpo.algorithm.objective.Objective", **hidden), composed, "outputs/theirs")


def test_following_the_advice_makes_a_component_of_the_user_trusted(composed):
    node = {"_target_": "my_functions.brief", "weight": 0.5}
    theirs = OmegaConf.create({"reward": {"components": {"brief": node}}})
    with pytest.raises(ConfigError) as refused:
        check_trusted(theirs, composed, "outputs/theirs")
    advice = str(refused.value).split("add: ")[1]
    check_trusted(theirs, compose_config([advice]), "outputs/theirs")


def test_code_of_a_model_runs_only_if_the_command_line_asks_for_it(composed):
    theirs = OmegaConf.create({"model": {"name": "outputs/theirs/model", "trust_remote_code": True}})
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code"):
        check_trusted(theirs, composed, "outputs/theirs")
    check_trusted(theirs, compose_config(["model.trust_remote_code=true"]), "outputs/theirs")


def test_attention_code_from_the_hub_runs_only_if_the_command_line_names_it(composed):
    theirs = OmegaConf.create({"model": {"name": "tiny", "attn_implementation": "someone/attention"}})
    with pytest.raises(ConfigError, match=r"if you trust it, add: model\.attn_implementation=someone/attention$"):
        check_trusted(theirs, composed, "outputs/theirs")
    check_trusted(theirs, compose_config(["model.attn_implementation=someone/attention"]), "outputs/theirs")
    check_trusted(OmegaConf.create({"model": {"attn_implementation": "eager"}}), composed, "outputs/theirs")


def test_a_missing_optional_package_is_answered_with_the_extra_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.optim", raising=False)
    with pytest.raises(ConfigError, match=r'bitsandbytes is not installed; add it with: pip install -e "\.\[8bit\]"'):
        bind("optimizer", {"_target_": "bitsandbytes.optim.AdamW8bit", "lr": 1e-3})
