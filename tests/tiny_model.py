import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.batch import Completions, tokenize_prompts
from grpo.c_library import compiler_version
from grpo.config.schema import ModelConfig
from grpo.model.implementation import implementation_of
from grpo.model.loading import load_model
from grpo.model.packed import supports_packing
from grpo.rollout.llama_decoder import supports_fast_decoding
from grpo.rollout.load_check import choose_implementation, load_checked_model
from grpo.tiny import MODEL_DIR


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")


@pytest.fixture(scope="session")
def plain_model():
    """The model as transformers loads it: padded batches, the cache of transformers."""
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def fast_model():
    """The model as the suite loads it: packed batches, decoding by `FastDecoder`, matrix products by oneDNN."""
    model = load_checked_model(tiny_config(), torch.device("cpu"))
    assert supports_packing(model)
    assert supports_fast_decoding(model)
    return model


@pytest.fixture(scope="session")
def compiled_model():
    """The same, with decoding by `CompiledDecoder`."""
    if compiler_version() == "none":
        pytest.skip("there is no C compiler")
    model = load_model(tiny_config(), torch.device("cpu"))
    choose_implementation(model, compiled_decoding=True)
    assert implementation_of(model).sampling == "compiled"
    return model


@pytest.fixture(scope="session", params=["plain", "fast", "compiled"])
def model(request):
    """Each of the three models in turn: a test must hold for all."""
    return request.getfixturevalue(f"{request.param}_model")


def tiny_config(**changes):
    settings = {"name": "tiny", "attn_implementation": "sdpa", "dtype": "float32", "device_map": "auto"}
    return ModelConfig(**settings | {"trust_remote_code": False} | changes)


def plain_completions(ids, group, mask=None):
    """Completions in which every token counts. mask, (B, T): 1 where there is a token, by default everywhere."""
    mask = torch.ones_like(ids) if mask is None else mask
    return Completions(ids, mask, mask, group)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """Three prompts of different lengths, so that there is padding."""
    questions = ["What is 37 + 48?", "Ann has 12 apples and buys 30 more. How many apples has Ann now?", "12 + 9?"]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    batch = tokenize_prompts(tokenizer, texts, torch.device("cpu"))
    assert batch.mask.sum(dim=1).unique().numel() > 1
    return batch
