"""Tests of the pre-flight, which runs before the first step, and of its warnings."""

import json

import pytest
import torch

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.data.sampler import PromptSampler
from grpo.training.experiment import build_experiment
from grpo.training.preflight import lines, preflight, warnings
from tests.launches import SETTINGS, assert_same_run, launch

FINE = {
    "prompts": 4,
    "completions": 32,
    "components": {
        "correctness": {"nonzero": 0.2, "mean": 0.4, "missing": 0.0},
        "format": {"nonzero": 0.9, "mean": 0.6, "missing": 0.0},
    },
    "reward": 1.0,
    "frac_reward_zero_std": 0.25,
    "completions/mean_length": 80.0,
    "completions/clipped_ratio": 0.1,
    "max_completion_length": 512,
    "prompt_lengths": {"min": 20, "median": 50.5, "max": 99},
    "seconds": 1.0,
}


@pytest.fixture
def found():
    """A function that runs the pre-flight with overrides; it returns the experiment and the result."""

    def run(*overrides):
        experiment = build_experiment(typed(compose_config([*SETTINGS, *overrides])))
        model = experiment.load_policy()
        sampler = PromptSampler(experiment.problems.train, experiment.config.seed)
        return experiment, preflight(experiment.build_engine(model), experiment.sampling(model), sampler, experiment)

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_the_result_has_the_rewards_of_completions_of_the_first_steps_problems(found):
    experiment, result = found("grpo.batch_size=9", "grpo.num_generations=16")
    assert (result["prompts"], result["completions"]) == (8, 128)
    parts = result["components"]
    assert result["reward"] == pytest.approx(sum(part["mean"] for part in parts.values()))
    assert 0 < parts["correctness"]["nonzero"] < 1
    # A completion with all four tags earns 0.8, and one with some of them less.
    assert parts["format"]["mean"] <= 0.8 * parts["format"]["nonzero"]
    texts = experiment.conversations(experiment.problems.train)
    lengths = [int(experiment.prompts([text]).mask.sum()) for text in texts]
    assert (result["prompt_lengths"]["min"], result["prompt_lengths"]["max"]) == (min(lengths), max(lengths))
    assert result["warnings"] == []


def test_a_completion_limit_that_is_too_low_is_reported(found):
    _, result = found("grpo.max_completion_length=6")
    assert result["completions/clipped_ratio"] == 1.0
    assert result["completions/mean_length"] == 6.0
    assert any("set grpo.max_completion_length=12" in text for text in result["warnings"])


def test_a_component_that_is_zero_for_all_completions_is_reported(found):
    """No completion is correct if all are truncated before the answer."""
    _, result = found("~reward.components.format", "grpo.max_completion_length=6")
    assert result["components"] == {"correctness": {"nonzero": 0.0, "mean": 0.0, "missing": 0.0, "highest": 2.0}}
    assert result["frac_reward_zero_std"] == 1.0
    assert [text.partition(" ")[0] for text in result["warnings"]] == ["correctness", "100%", "100%"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"frac_reward_zero_std": 0.8}, "80% of the groups have equal rewards"),
        ({"completions/clipped_ratio": 0.5}, "50% of the completions are truncated at 512 tokens"),
        ({"components": {"mine": {"nonzero": 0.0, "mean": 0.0, "missing": 0.0}}}, "mine is 0 for all 32 completions"),
        ({"components": {"penalty": {"nonzero": 0.0, "mean": 0.0, "missing": 0.0, "highest": 0.0}}}, None),
        ({"components": {"mine": {"nonzero": 0.0, "mean": None, "missing": 1.0}}}, "mine gave no value"),
        ({"components": {"mine": {"nonzero": 0.0, "mean": 0.0, "missing": 0.5}}}, "mine is 0 for all 32 completions"),
    ],
)
def test_each_obstacle_to_learning_gives_one_warning(change, said):
    texts = warnings(FINE | change)
    assert len(texts) == (said is not None)
    assert all(said in text for text in texts)
    assert [line for line in lines(FINE | {"warnings": texts}) if line.startswith("warning")] == [
        f"warning: {text}" for text in texts
    ]


def test_a_run_stores_its_preflight_result_and_is_the_same_without_preflight(tmp_path, straight):
    assert json.loads((straight / "preflight.json").read_text())["completions"] == 12
    without = tmp_path / "run"
    result = launch(*SETTINGS, f"run_dir={without}", "preflight=false", cwd=tmp_path)
    assert "pre-flight" not in result.stdout
    assert not (without / "preflight.json").exists()
    assert_same_run(without, straight)
