import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.batch import Prompts, split_rows
from grpo.config.schema import LoraSettings
from grpo.counter_rng import group_keys
from grpo.model import linear, threads
from grpo.model.implementation import implementation_of
from grpo.model.linear import use_onednn
from grpo.model.lora import add_adapter
from grpo.model.threads import use_threads
from grpo.rollout import native as engine
from grpo.rollout.engine import Sampling
from grpo.rollout.llama_decoder import FastDecoder, supports_fast_decoding
from grpo.rollout.load_check import choose_implementation
from grpo.rollout.native import CachedDecoder, completion_mask, rollout
from tests.oracles import completion_logps_unshared

pytestmark = pytest.mark.usefixtures("onednn_for_small_weights")


@pytest.fixture
def sampling(tokenizer):
    return Sampling(32, 1.0, (tokenizer.eos_token_id,), tokenizer.pad_token_id)


def sample(model, prompts, sampling, generations=4, seed=1, step=1, token_budget=10**6, **how):
    keys = group_keys(seed, step, np.arange(len(prompts.ids)), generations)
    return rollout(model, prompts, sampling, group_size=generations, keys=keys, token_budget=token_budget, **how)


def test_greedy_decoding_equals_that_of_transformers(model, tokenizer, prompts, sampling):
    ours = sample(model, prompts, replace(sampling, temperature=0.0), generations=1)
    theirs = model.generate(prompts.ids, attention_mask=prompts.mask, max_new_tokens=32, do_sample=False)
    theirs = theirs[:, prompts.ids.shape[1] :]
    assert torch.equal(ours.ids * ours.attention_mask, theirs * completion_mask(theirs, sampling.stop_ids))


def test_the_same_seed_and_step_give_the_same_completions_and_others_do_not(model, prompts, sampling):
    first, again = sample(model, prompts, sampling), sample(model, prompts, sampling)
    assert torch.equal(first.ids, again.ids)
    for other in (sample(model, prompts, sampling, seed=2), sample(model, prompts, sampling, step=2)):
        assert other.ids.shape != first.ids.shape or not torch.equal(other.ids, first.ids)


def test_a_group_contains_different_completions(model, prompts, sampling):
    completions = sample(model, prompts, sampling, generations=8)
    assert len({tuple(row.tolist()) for row in completions.ids[:8]}) > 1


@pytest.mark.parametrize("token_budget", [1, 200, 350])
def test_decoding_fewer_rows_at_once_gives_the_same_completions(model, prompts, sampling, token_budget):
    whole = sample(model, prompts, sampling)
    parts = sample(model, prompts, sampling, token_budget=token_budget)
    # A rounding error changes a token only if two tokens are nearly tied, which is not the case here.
    assert torch.equal(whole.ids * whole.attention_mask, parts.ids * parts.attention_mask)


def test_the_completions_of_a_prompt_do_not_depend_on_the_other_prompts_of_the_batch(model, prompts, sampling):
    both = sample(model, prompts, sampling)
    alone = sample(model, Prompts(prompts.ids[:1], prompts.mask[:1]), sampling)
    width = alone.ids.shape[1]
    assert torch.equal(both.ids[:4, :width] * alone.attention_mask, alone.ids * alone.attention_mask)


def test_tokens_are_drawn_from_the_models_distribution(model, prompts, sampling):
    """Compares the first tokens of many completions of one prompt with the model's probabilities."""
    one = Prompts(prompts.ids[:1], prompts.mask[:1])
    first = replace(sampling, max_new_tokens=1, temperature=1.7)
    drawn = sample(model, one, first, generations=4000, seed=3).ids[:, 0]
    probabilities = (model(one.ids, attention_mask=one.mask).logits[0, -1].double() / 1.7).softmax(0)
    common = probabilities * 4000 >= 5
    expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]]) * 4000
    counts = drawn.bincount(minlength=len(probabilities)).double()
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    degrees = len(expected) - 1
    assert degrees >= 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 4


def test_the_mask_ends_with_the_first_end_of_sequence_token():
    ids = torch.tensor([[5, 9, 5, 9], [9, 5, 5, 5], [5, 5, 5, 5]])
    assert completion_mask(ids, (9,)).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_no_completion_ends_before_min_new_tokens(model, prompts, sampling):
    forced = sample(model, prompts, replace(sampling, min_new_tokens=32), generations=2)
    assert forced.lengths.tolist() == [32] * 6


def test_finished_rows_are_removed_from_the_batch(model, prompts, sampling, monkeypatch):
    """The model must not be run on finished rows; a hook on the model counts the rows."""
    rows = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel()))
    completions = sample(model, prompts, sampling, generations=16)
    hook.remove()
    lengths = completions.lengths
    assert rows[0] in (prompts.ids.numel(), prompts.mask.sum())  # the prompts, once each
    assert rows[1] == 48
    assert rows[-1] < 48
    assert len(rows) == lengths.max()  # no pass after the last row has ended


def test_a_lower_temperature_gives_likelier_completions(model, prompts, sampling):
    """Compares the mean log-probability of a token, computed at temperature 1."""
    means = []
    for temperature in (0.3, 1.0, 2.0):
        completions = sample(model, prompts, replace(sampling, temperature=temperature), generations=16)
        logps = completion_logps_unshared(model, prompts, completions, 1.0).logps
        means.append((logps.sum() / completions.lengths.sum()).item())
    assert means[0] > means[1] > means[2]


def test_the_log_probabilities_of_sampling_equal_those_of_the_training_pass(model, prompts, sampling):
    warm = replace(sampling, temperature=0.7, min_new_tokens=3)
    completions = sample(model, prompts, warm)
    expected = completion_logps_unshared(model, prompts, completions, 0.7).logps
    torch.testing.assert_close(completions.sampling_logps, expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fast_decoding_gives_the_same_tokens_as_plain_decoding(plain_model, fast_model, prompts, sampling, temperature):
    fast, plain = (
        sample(each, prompts, replace(sampling, temperature=temperature), 8) for each in (fast_model, plain_model)
    )
    assert fast.ids.shape[1] == plain.ids.shape[1]
    assert torch.equal(fast.ids * fast.attention_mask, plain.ids * plain.attention_mask)


def model_of_the_family(kind, tied):
    settings = {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
    if kind == "mistral":
        settings["sliding_window"] = None
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, tie_word_embeddings=tied)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases and norms too
    use_onednn(model)
    choose_implementation(model)
    assert implementation_of(model).sampling == "fast"
    return model


def test_fast_decoding_works_with_a_single_prompt(prompts, sampling):
    model = model_of_the_family("qwen2", True)
    one = Prompts(prompts.ids[:1], prompts.mask[:1])
    check_fast_decoding(model, one, torch.zeros(8, dtype=torch.long))


def test_a_decoder_is_freed_when_nothing_refers_to_it(prompts):
    """A decoder has the keys and values of its rows and, on a CPU, a second copy of the weights."""
    with torch.no_grad():
        decoder = FastDecoder(model_of_the_family("llama", True), prompts, torch.arange(3), 4)
        for _ in range(2):
            decoder.read(torch.tensor([5, 6, 7]))
    held = weakref.ref(decoder)
    del decoder
    assert held() is None


def check_fast_decoding(model, prompts, prompt_of_row=None):
    """Compare the logits of fast and plain decoding at each step, while rows are removed."""
    assert supports_fast_decoding(model)
    prompt_of_row = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]) if prompt_of_row is None else prompt_of_row
    tokens = torch.randint(5, 600, (8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, fast = (kind(model, prompts, prompt_of_row, 8) for kind in (CachedDecoder, FastDecoder))
    torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-4, atol=1e-4)
    before = list(range(8))
    with torch.no_grad():
        for t, rows in enumerate([before] * 4 + [[0, 2, 3, 4, 6], [0, 2, 3, 4, 6], [0, 3, 4], [4]]):
            for decoder in (fast, plain):
                if rows != before:
                    decoder.keep(torch.tensor([before.index(row) for row in rows]))
                decoder.read(tokens[rows, t])
            before = rows
            torch.testing.assert_close(fast.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [0, 2**62], ids=["oneDNN", "torch"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_fast_decoding_equals_plain_decoding_for_each_model_of_the_family(kind, tied, least, prompts, monkeypatch):
    """With biases (Qwen2), with norms of heads (Qwen3), and without either (Llama, Mistral).

    least: the elements from which on a weight is large. Small weights are fused, and multiplied by torch.
    """
    monkeypatch.setattr(linear, "LEAST_ELEMENTS", least)
    monkeypatch.setattr(linear, "FEW_ROWS", 0)
    check_fast_decoding(model_of_the_family(kind, tied), prompts)


@pytest.mark.parametrize("least", [0, 2**62], ids=["oneDNN", "torch"])
def test_fast_decoding_adds_a_trained_adapter(least, prompts, monkeypatch):
    monkeypatch.setattr(linear, "LEAST_ELEMENTS", least)
    monkeypatch.setattr(linear, "FEW_ROWS", 0)
    model = model_of_the_family("qwen2", True)
    add_adapter(model, LoraSettings(rank=4, alpha=4, target_modules="all-linear", init_from=None), torch.float32, 1)
    adapters = [each for name, each in model.named_parameters() if ".lora_" in name]
    assert adapters
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.2)
    choose_implementation(model)
    check_fast_decoding(model, prompts)


@pytest.mark.parametrize("least", [0, 2**62], ids=["all", "one"])
def test_decoding_gives_the_same_tokens_with_other_threads_and_restores_their_number(
    fast_model, prompts, sampling, monkeypatch, least
):
    expected = sample(fast_model, prompts, sampling)
    monkeypatch.setattr(threads, "LEAST_MULTIPLICATIONS", least)
    used = set()
    attend = FastDecoder._attend

    def counted(*arguments):
        used.add(torch.get_num_threads())
        return attend(*arguments)

    monkeypatch.setattr(FastDecoder, "_attend", counted)
    with use_threads(2):
        found = sample(fast_model, prompts, sampling)
        assert torch.get_num_threads() == 2
    assert used == {1 if least else 2}
    assert torch.equal(found.ids, expected.ids)


def test_the_number_of_threads_is_restored_if_decoding_fails(fast_model, prompts, sampling, monkeypatch):
    def fail(*_):
        raise RuntimeError("failed")

    monkeypatch.setattr(FastDecoder, "_attend", fail)
    with use_threads(2):
        with pytest.raises(RuntimeError, match="failed"):
            sample(fast_model, prompts, sampling)
        assert torch.get_num_threads() == 2


def test_split_rows_counts_each_prompt_once_per_part_and_never_splits_a_row():
    lengths, prompt_of_row = torch.tensor([10, 20]), torch.tensor([0, 0, 0, 1, 1])

    def parts(row_lengths, budget, shared=True):
        return [part.tolist() for part in split_rows(lengths, prompt_of_row, row_lengths, budget, shared)]

    assert parts(5, 55) == [[0, 1, 2, 3, 4]]  # 10 + 3 * 5 + 20 + 2 * 5
    assert parts(5, 54) == [[0, 1, 2, 3], [4]]
    assert parts(5, 25) == [[0, 1, 2], [3], [4]]
    assert parts(torch.tensor([15, 1, 1, 1, 1]), 27) == [[0, 1, 2], [3, 4]]
    assert parts(5, 1) == [[0], [1], [2], [3], [4]]
    assert parts(5, 30, shared=False) == [[0, 1], [2], [3], [4]]  # 2 * (10 + 5) fits; 10 + 5 + 20 + 5 does not
    # The padded size 9 * (100 + 1) is over 8 * 110, and 4 * (2 + 15) is over 2 * 26.
    ten = torch.zeros(10, dtype=torch.long)
    assert [len(part) for part in split_rows(torch.tensor([100]), ten, 1, 110, shared=True)] == [8, 2]
    lengths = torch.tensor([2, 2])
    assert parts(torch.tensor([15, 1, 1, 1, 1]), 26, shared=False) == [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("habits", [(4, 0.75), (16, 0.75), (1, 0.5)])
def test_how_often_finished_rows_are_removed_changes_no_completion(model, prompts, sampling, monkeypatch, habits):
    """As on accelerators, where a check after every token would wait for the device."""
    expected = sample(model, prompts, sampling, generations=8)
    monkeypatch.setattr(engine, "ON_CPU", habits)
    seldom = sample(model, prompts, sampling, generations=8)
    width = expected.ids.shape[1]
    assert torch.equal(seldom.ids[:, :width] * expected.attention_mask, expected.ids * expected.attention_mask)
    assert torch.equal(seldom.lengths, expected.lengths)
    torch.testing.assert_close(seldom.sampling_logps[:, :width], expected.sampling_logps, rtol=1e-4, atol=1e-5)
