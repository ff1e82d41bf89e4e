import pytest
import torch

import grpo.engine.model as engine
from grpo.config import ConfigError, ModelConfig
from grpo.engine.model import (
    CompletionBatch,
    completion_logps,
    completion_logps_unshared,
    load_model,
    load_tokenizer,
    stop_token_ids,
)


@pytest.fixture
def completions():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7, 9, 2])[:, None]).long()
    return CompletionBatch(torch.randint(5, 250, (6, 9), generator=generator), mask)


PROMPT_OF_ROW = torch.tensor([0, 0, 1, 1, 2, 2])


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_sharing_the_prompt_changes_neither_log_probabilities_nor_their_gradient(model, prompts, completions):
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    shared = completion_logps(model, prompts, completions, PROMPT_OF_ROW, 0.7)
    plain = completion_logps_unshared(model, prompts, completions, PROMPT_OF_ROW, 0.7)
    torch.testing.assert_close(shared.logps, plain.logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(shared.entropy, plain.entropy, rtol=1e-5, atol=2e-5)
    ours, theirs = (gradient(model, (x.logps * weights).sum()) for x in (shared, plain))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_log_probabilities_are_zero_outside_the_mask(model, prompts, completions):
    result = completion_logps(model, prompts, completions, PROMPT_OF_ROW, 1.0)
    outside = completions.mask == 0
    assert (result.logps[outside] == 0).all()
    assert (result.entropy[outside] == 0).all()
    assert (result.logps[~outside] < 0).all()


def test_the_size_of_the_logit_chunks_changes_nothing(model, prompts, completions, monkeypatch):
    whole = completion_logps(model, prompts, completions, PROMPT_OF_ROW, 1.0)
    monkeypatch.setattr(engine, "LOGITS_PER_CHUNK", 3 * model.config.vocab_size)
    chunked = completion_logps(model, prompts, completions, PROMPT_OF_ROW, 1.0)
    torch.testing.assert_close(chunked.logps, whole.logps, rtol=1e-6, atol=1e-6)
    ours, theirs = (gradient(model, x.logps.sum()) for x in (chunked, whole))
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_completions_of_one_token_need_no_second_forward(model, prompts):
    one = CompletionBatch(torch.tensor([[7]] * 6), torch.ones(6, 1, dtype=torch.long))
    shared = completion_logps(model, prompts, one, PROMPT_OF_ROW, 1.0)
    plain = completion_logps_unshared(model, prompts, one, PROMPT_OF_ROW, 1.0)
    torch.testing.assert_close(shared.logps, plain.logps, rtol=1e-5, atol=1e-5)


def model_config(name, attn_implementation="sdpa"):
    return ModelConfig(
        name=name, attn_implementation=attn_implementation, dtype="float32", device_map="auto", trust_remote_code=False
    )


def test_the_embedded_model_is_found_by_its_name():
    config = model_config("tiny")
    model = load_model(config, torch.device("cpu"))
    tokenizer = load_tokenizer(config)
    assert tokenizer.padding_side == "left"
    assert not model.training
    assert tokenizer.eos_token_id in stop_token_ids(model, tokenizer)


def test_an_architecture_that_scales_its_logits_is_refused(tmp_path):
    """Gemma 2 caps its logits after the head; taking hidden states through the head alone would be wrong."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.01,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="changes its logits after the output head"):
        load_model(model_config(str(tmp_path), "eager"), torch.device("cpu"))
