"""The recipe of the embedded model: `python -m grpo.tiny.train` creates `grpo/tiny/model/`, in minutes on a CPU.

A small Qwen2 learns to add two-digit numbers from demonstrations that are often careless: they forget to carry, and
they forget tags. The sums themselves are always right, and each omission is drawn independently. So the model can add,
but it often omits the carry or a tag. GRPO can then teach it to be careful.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo.data.arithmetic import problems
from grpo.rewards.math_xml import TAGS, accuracy, correctness, tag_format
from grpo.tiny import MODEL_DIR

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# Probabilities that a demonstration carries and that it has the tags. Those of the tags depend on the kind of question,
# so that also with greedy decoding some answers have all tags and others do not.
CARRIES = 0.4
REASONING_TAGS = {"sum": 0.6, "story": 0.7}
ANSWER_TAGS = {"sum": 0.7, "story": 0.4}

MAX_VOCABULARY = 384  # enough for each word of the problems as one token
MAX_LENGTH = 512
MAX_NEW_TOKENS = 40
SEED = 0
BATCH_SIZE = 128
STEPS = 1000
WARMUP_STEPS = 50
LEARNING_RATE = 6e-3


def main() -> None:
    """Train the model, save it and print its results on the test split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=MODEL_DIR, help="where to save it (default: %(default)s)")
    output_dir = parser.parse_args().output_dir

    # Sums then have the same order on any number of cores; a model this small gains nothing from a second thread.
    torch.set_num_threads(1)
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    torch.manual_seed(SEED)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    test = problems("test")
    for name, temperature in (("greedy", 0.0), ("sampled at temperature 1", 1.0)):
        torch.manual_seed(SEED)
        texts = complete(model, tokenizer, [problem["question"] for problem in test], temperature)
        print(f"{name}: {summary(texts, [problem['answer'] for problem in test], tokenizer)}")


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer that can encode any text (normalised to NFC), with one token per digit and per tag.

    Its class is Qwen2Tokenizer, which splits digits already, because AutoTokenizer loads this class for every Qwen2
    model. The tags are ordinary tokens, because decoding drops special ones.
    """
    untrained = Qwen2Tokenizer(
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )
    texts = ["system\nuser\nassistant\n", *(problem["question"] for problem in problems("demonstrations"))]
    tokenizer = untrained.train_new_from_iterator(texts, vocab_size=MAX_VOCABULARY - len(TAGS), show_progress=False)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """An untrained Qwen2 with the tokenizer's vocabulary; its weights are drawn from torch's random state."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=True,
        dtype="float32",
        **tokens,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**tokens)
    return model


def demonstrate(problem: dict, rng: random.Random) -> str:
    """A worked answer to a problem: units, then tens, then the number; `rng` decides about carry and tags."""
    a, b = (int(operand) for operand in problem["id"].split("+"))
    kind = "sum" if "+" in problem["question"] else "story"
    carries, reasoning_tags, answer_tags = (
        rng.random() < probability for probability in (CARRIES, REASONING_TAGS[kind], ANSWER_TAGS[kind])
    )
    units = a % 10 + b % 10
    carry = "+1" if units >= 10 and carries else ""
    tens = a // 10 + b // 10 + bool(carry)
    reasoning = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{carry}={tens}"
    answer = f"{tens}{units % 10}"
    if reasoning_tags:
        reasoning = f"<reasoning>{reasoning}</reasoning>"
    if answer_tags:
        answer = f"<answer>{answer}</answer>"
    return f"{reasoning}\n{answer}"


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Supervised training on the "demonstrations" split, with the loss on the completions only, in place.

    Omissions are drawn again in every batch, so that the model learns their frequency and not which problems have them.
    """
    taught = problems("demonstrations")
    prompts = [tokenizer.encode(render(tokenizer, problem["question"])) for problem in taught]
    rng = random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1 - step / STEPS)
    )
    model.train()
    for step in range(1, STEPS + 1):
        rows = rng.sample(range(len(taught)), BATCH_SIZE)
        completions = tokenizer([demonstrate(taught[row], rng) + tokenizer.eos_token for row in rows]).input_ids
        ids, labels = _batch([prompts[row] for row in rows], completions, tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % 100 == 0:
            print(f"step {step}/{STEPS}  loss {loss.item():.4f}", flush=True)
    model.eval()


def _batch(prompts: list[list[int]], completions: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (rows, longest) int64, right-padded; labels are -100 outside the completions."""
    width = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    labels = torch.full((len(prompts), width), -100)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def render(tokenizer: Qwen2Tokenizer, question: str) -> str:
    """The question as a chat without a system message, up to where the assistant begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # because tokenize=False
    return text


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, questions: list[str], temperature: float = 0.0
) -> list[str]:
    """One completion per question, with its tags: greedy at temperature 0, else sampled with torch's random state."""
    prompts = tokenizer([render(tokenizer, question) for question in questions], padding=True, return_tensors="pt")
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    ids = model.generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=MAX_NEW_TOKENS, **how
    )
    return tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)


def summary(texts: list[str], answers: list[str], tokenizer: Qwen2Tokenizer) -> str:
    """One line: accuracy, mean reward (correctness and format) and mean length."""
    right = accuracy([], texts, answers)
    rewards = correctness([], texts, answers)
    lengths = [len(ids) + 1 for ids in tokenizer(texts).input_ids]  # with the end-of-sequence token
    n = len(texts)
    reward = sum(rewards) + sum(tag_format([], texts))
    return f"accuracy {sum(right) / n:.1%}, reward {reward / n:.2f}, length {sum(lengths) / n:.1f} tokens (n={n})"


if __name__ == "__main__":
    main()
