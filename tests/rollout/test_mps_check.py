"""Tests on the CPU of what a run on Apple's GPU relies on: the operations that it avoids, and the checks before it."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from grpo.config.checks import typed
from grpo.config.compose import compose_config
from grpo.config.errors import ConfigError
from grpo.config.schema import LoraSettings
from grpo.counter_rng import group_keys
from grpo.model import packed
from grpo.model.logps import completion_logps
from grpo.model.lora import add_adapter
from grpo.rollout.load_check import load_checked_model
from grpo.rollout.mps_check import check_device
from grpo.rollout.native import check_decoding
from grpo.training.experiment import build_experiment
from grpo.training.trainer import Trainer
from grpo.training.update import Batch
from tests.launches import SETTINGS
from tests.tiny_model import plain_completions, tiny_config

CPU = torch.device("cpu")


class Dtypes(TorchDispatchMode):
    """Counts the dtypes of all computed tensors."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen.update(x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_sampling_and_an_update_use_no_growing_cache_and_no_float64(monkeypatch, compute):
    """Runs a whole step except for the scoring of completions, which is always done on the CPU."""
    threads = torch.get_num_threads()
    overrides = [*SETTINGS, "tuning=lora", f"hardware.compute_dtype={compute}"]
    trainer = Trainer(build_experiment(typed(compose_config(overrides))))
    check_decoding(trainer.master)

    def refuse(self, *args, **kwargs):
        raise AssertionError("a growing cache was made")

    monkeypatch.setattr(DynamicCache, "__init__", refuse)
    monkeypatch.setattr(packed, "_takes_groups", lambda device, masked: False)
    experiment = trainer.experiment
    prompts = experiment.prompts(experiment.conversations(experiment.problems.train[:3]))
    keys = group_keys(experiment.config.seed, 1, np.arange(3), group_size=2)
    try:
        with Dtypes() as dtypes:
            completions = trainer.engine.generate(prompts, trainer.sampling, group_size=2, keys=keys)
            batch = Batch(prompts, completions, torch.tensor([1.0, -1.0] * 3), torch.zeros(completions.ids.shape))
            assert all(update.finite for _ in range(2) for update in trainer._update_policy(batch))
            completion_logps(trainer.reference, prompts, completions, 1.0)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert dtypes.seen[getattr(torch, compute)] > 0
    assert dtypes.seen[torch.float64] == 0


def test_repeated_heads_give_the_same_results_as_grouped_heads(monkeypatch, prompts):
    model = load_checked_model(tiny_config(), CPU)
    completions = plain_completions(torch.randint(5, 200, (6, 9)), torch.arange(6) // 2)
    assert model.config.num_attention_heads != model.config.num_key_value_heads
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(packed, "_takes_groups", lambda device, masked, grouped=grouped: grouped)
        results.append(completion_logps(model, prompts, completions, 1.0).logps)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_device_that_computes_the_same_as_the_cpu_passes():
    check_device(CPU)


@pytest.mark.parametrize("wrong", [torch.nan, 1.05])
def test_a_device_that_computes_wrong_numbers_is_refused(monkeypatch, wrong):
    """The last call of torch's attention on the first of the two devices gives a wrong result."""
    attention, calls, broken = torch.nn.functional.scaled_dot_product_attention, Counter(), set()

    def counted(*args, **kwargs):
        calls["attention"] += 1
        return attention(*args, **kwargs) * (wrong if calls["attention"] in broken else 1.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    check_device(CPU)
    broken.add(calls["attention"] + calls["attention"] // 2)
    with pytest.raises(ConfigError, match="the log-probabilities of the embedded model on cpu differ"):
        check_device(CPU)


def test_a_model_that_needs_the_growing_cache_is_refused():
    model = load_checked_model(tiny_config(attn_implementation="eager"), CPU)
    with pytest.raises(ConfigError, match="use hardware=cpu, or one of Llama, Mistral, Qwen2, Qwen3 with"):
        check_decoding(model)


def test_a_model_with_an_adapter_passes_the_check():
    model = load_checked_model(tiny_config(), CPU)
    add_adapter(model, LoraSettings(4, 8, "all-linear", None), torch.float32, seed=1)
    check_decoding(model)
