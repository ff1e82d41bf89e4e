"""Prompts with their completions must fit into the positions that a model declares."""

import logging

import pytest
import torch
from transformers import AutoTokenizer

from grpo.batch import Completions, Prompts
from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.model.logps import completion_logps
from grpo.tiny import MODEL_DIR
from grpo.training.experiment import build_experiment
from tests.architectures import random_model

FACTORS = [1.0, 2.0, 3.0, 4.0]  # of longrope, for each of the 4 frequencies of a head
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONGROPE = {"rope_type": "longrope", "factor": 8.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": FACTORS}


def experiment(folder, kind, *overrides, **changes):
    """The experiment of a random model; its longest prompt has 26 tokens, and a completion 40 by default."""
    random_model(kind, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    names = ["experiment=quickstart", f"model.name={folder}", "hardware=cpu", *overrides]
    return build_experiment(typed(compose_config(names)))


def test_learned_positions_end_where_the_model_says(tmp_path):
    with pytest.raises(ConfigError, match=r"that is 66 tokens, and model.name=\S+ is for 64; lower it to 38"):
        experiment(tmp_path, "gpt2", n_positions=64)
    fitting = experiment(tmp_path, "gpt2", "grpo.max_completion_length=38", n_positions=64)
    assert fitting.max_length == 64


def test_rotary_positions_can_be_extended_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert experiment(tmp_path, "llama", max_position_embeddings=64).max_length == 66
    assert "its positions can be extended, but its answers may become poor" in caplog.text


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {"max_position_embeddings": 64, "rope_parameters": DYNAMIC}),
        ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    ],
)
def test_positions_that_depend_on_the_longest_sequence_of_a_batch_are_refused_where_they_do(tmp_path, kind, changes):
    """Beyond 64 tokens the log-probabilities of a short sequence depend on the other sequences of its batch."""
    with pytest.raises(ConfigError, match=r"beyond 64 .* changes the positions of all tokens"):
        experiment(tmp_path, kind, **changes)
    assert experiment(tmp_path, kind, "grpo.max_completion_length=38", **changes).max_length == 64
    model = random_model(kind, **changes)
    alone, beside_a_long_one = (first_of(model, lengths) for lengths in ((20,), (20, 60)))
    assert (alone - beside_a_long_one).abs().max() > 1e-4


def first_of(model, lengths):
    """The log-probabilities of the first completion, of 20 tokens, computed with others of these lengths."""
    ids = torch.arange(100, 100 + max(lengths))[None].repeat(len(lengths), 1)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    prompts = Prompts(torch.arange(20, 40)[None], torch.ones(1, 20, dtype=torch.long))
    group = torch.zeros(len(lengths), dtype=torch.long)
    return completion_logps(model, prompts, Completions(ids, mask, mask, group), 1.0).logps[0, :20].detach()
