import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.engine.model import tokenize_prompts
from grpo.tiny import MODEL_DIR


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, padding_side="left")


@pytest.fixture(scope="session")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


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
