"""The overrides of a command line: keys and values, in every notation."""

import pytest
from hydra.errors import HydraException

from grpo.config.compose import compose_config
from grpo.config.hydra_app import split_into_jobs
from grpo.config.overrides import Overrides, quoted
from grpo.config.schema import PASSING_KEYS

WRITTEN = ["grpo.beta=0.1", "+grpo.beta=0.1", "++grpo.beta=0.1", "~grpo.beta", "grpo.beta=0.1,0.2"]


@pytest.mark.parametrize("line", WRITTEN)
def test_a_key_is_the_same_in_every_notation(line):
    overrides = Overrides(["seed=1", line])
    assert overrides.keys == ["seed", "grpo.beta"]
    assert overrides.names("grpo.beta")
    assert overrides.names("grpo")
    assert not overrides.names("grpo.bet", "beta")
    assert overrides.select({"grpo.beta"}).lines == [line]
    assert overrides.without({"grpo.beta"}).lines == ["seed=1"]


def test_a_config_group_counts_as_a_key():
    overrides = Overrides(["hydra/launcher=basic", "model@model=tiny", "+experiment=a,b"])
    assert overrides.keys == ["hydra/launcher", "model", "experiment"]
    assert overrides.dotted_keys == ["hydra.launcher", "model", "experiment"]
    assert overrides.swept == ["experiment"]
    assert overrides.of_hydra.lines == ["hydra/launcher=basic"]
    assert overrides.of_experiment.lines == ["model@model=tiny", "+experiment=a,b"]


def test_the_last_value_of_a_key_is_used():
    overrides = Overrides(["seed=1", "grpo.mu=2", "++seed=3"])
    assert overrides.value("seed") == 3
    assert overrides.texts == {"seed": "3", "grpo.mu": "2"}
    assert overrides.value("name") is None


def test_swept_keys_are_those_with_several_values():
    overrides = Overrides(["grpo.mu=1", "+x.y=1,2", "seed=range(1,4)", "data.examples=[1,2]", "name='a,b'"])
    assert overrides.swept == ["x.y", "seed"]


def test_a_range_is_expanded_once_to_the_values_of_the_jobs():
    overrides = Overrides(["grpo.mu=1", "++seed=range(1,4)"])
    points = split_into_jobs(overrides.lines)
    assert overrides.expand(points).lines == ["grpo.mu=1", "++seed=1,2,3"]
    assert split_into_jobs(overrides.expand(points).lines) == points


def test_overrides_about_the_launch_are_not_part_of_the_sweep():
    overrides = Overrides(["b=1", "resume=true", "+a=2", "plan=true", "sweep_dir=x", "fork=true", "run_dir=y"])
    assert overrides.without(PASSING_KEYS).lines == ["b=1", "+a=2", "fork=true", "run_dir=y"]


@pytest.mark.parametrize(
    "text", ["a", "it's", 'say "hi"', r"C:\new", r"\'", "a,b", "x=y", "[1]", "${seed}", r"\${x}", " a "]
)
def test_quoted_text_is_taken_literally(text):
    cfg = compose_config([f"data.system_prompt={quoted(text)}"])
    assert cfg.data.system_prompt == text


def test_an_override_that_hydra_cannot_parse_raises_the_error_of_hydra():
    with pytest.raises(HydraException):
        _ = Overrides(["seed=[1"]).keys
