import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from grpo.data.arithmetic import problems
from grpo.rewards.math_xml import TAGS, extract_answer
from grpo.tiny import MODEL_DIR
from grpo.tiny.train import _batch, build_tokenizer, complete, demonstrate


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 37 + 48?",
        "  two  spaces\n\n\tand tabs ",
        "Zoë's naïve €5 ½²",
        "한국어 日本語 العربية",
        "👩‍🚀🏳️‍🌈 \x00\x7f",
    ],
)
def test_encoding_and_decoding_return_any_text_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_tag_is_one_token_and_is_kept_when_decoding(tokenizer):
    for tag in TAGS:
        ids = tokenizer.encode(tag)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == tag
    text = "<reasoning>7+8=15, 3+4+1=8</reasoning>\n<answer>85</answer>"
    ids = tokenizer.encode(text + "<|im_end|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) < 30
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_each_digit_is_one_token_in_every_context(tokenizer):
    digits = [tokenizer.encode(digit) for digit in "0123456789"]
    assert all(len(ids) == 1 for ids in digits)
    tokens = tokenizer.encode("What is 37 + 4815?x9")
    assert [i for i in tokens if [i] in digits] == [digits[int(d)][0] for d in "3748159"]


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode("a<|im_start|><|im_end|><|endoftext|>b"), skip_special_tokens=True) == "ab"
    stops = GenerationConfig.from_pretrained(MODEL_DIR)
    assert (stops.eos_token_id, stops.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_the_chat_template_adds_only_role_markers(tokenizer):
    user = {"role": "user", "content": "What is 37 + 48?"}
    system = {"role": "system", "content": "Add."}
    assert (
        tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
        == "<|im_start|>user\nWhat is 37 + 48?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (
        tokenizer.apply_chat_template([system, user, {"role": "assistant", "content": "85"}], tokenize=False)
        == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\nWhat is 37 + 48?<|im_end|>\n"
        "<|im_start|>assistant\n85<|im_end|>\n"
    )


def test_the_training_script_builds_the_tokenizer_that_is_saved(tokenizer):
    made = build_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    for problem in problems("train")[:20]:
        assert made.encode(problem["question"]) == tokenizer.encode(problem["question"])


def test_the_model_is_a_small_qwen2(model, tokenizer):
    assert type(model) is Qwen2ForCausalLM
    assert model.num_parameters() <= 1_500_000
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 4 * 2**20
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)


def test_the_model_solves_between_a_fifth_and_a_half_of_the_problems(model, tokenizer):
    test = problems("test")[:200]
    texts = complete(model, tokenizer, [problem["question"] for problem in test])
    right = [extract_answer(text) == problem["answer"] for text, problem in zip(texts, test, strict=True)]
    assert 0.20 <= sum(right) / len(test) <= 0.50


def test_sampling_finds_complete_and_correct_answers_to_problems_of_every_kind(model, tokenizer):
    torch.manual_seed(0)
    test = problems("test")
    texts = complete(model, tokenizer, [problem["question"] for problem in test], temperature=1.0)
    careful = {}
    for text, problem in zip(texts, test, strict=True):
        a, b = (int(operand) for operand in problem["id"].split("+"))
        kind = ("+" in problem["question"], a % 10 + b % 10 >= 10)
        whole = extract_answer(text) == problem["answer"] and all(tag in text for tag in TAGS)
        careful.setdefault(kind, []).append(whole)
    assert len(careful) == 4
    for whole in careful.values():
        assert sum(whole) / len(whole) >= 0.05  # about 0.13 where a carry is needed, 0.3 to 0.4 elsewhere


def test_demonstrations_are_correct_or_omit_the_carry():
    rng = random.Random(0)
    seen = set()
    for problem in problems("demonstrations")[:1000]:
        text = demonstrate(problem, rng)
        tags = tuple(tag in text for tag in TAGS)
        given = int(re.sub(r"<[^>]*>", "", text).splitlines()[-1])
        forgotten = int(problem["answer"]) - given
        assert tags[0] == tags[1] and tags[2] == tags[3]
        assert forgotten in (0, 10)
        seen.add((tags[0], tags[2], forgotten))
    assert len(seen) == 8  # every combination: with or without reasoning tags, answer tags and carry


def test_a_complete_demonstration_has_the_format_that_the_rewards_expect():
    class Careful:
        def random(self):
            return 0.0

    problem = {"id": "67+58", "question": "What is 67 + 58?", "answer": "125"}
    assert demonstrate(problem, Careful()) == "<reasoning>7+8=15, 6+5+1=12</reasoning>\n<answer>125</answer>"


def test_the_loss_is_computed_on_completion_tokens_only():
    ids, labels = _batch([[5, 6], [7]], [[8], [9, 10, 11]], pad_id=0)
    assert ids.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert labels.tolist() == [[-100, -100, 8, -100], [-100, 9, 10, 11]]
