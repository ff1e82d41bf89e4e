"""Tests of rendering problems as prompts, and of choosing the problems of a step."""

import pytest

from grpo.config.errors import ConfigError
from grpo.config.schema import ModelConfig
from grpo.data.problems import Problem
from grpo.data.prompts import messages, render
from grpo.data.sampler import PromptSampler, epoch_order, problems_before
from grpo.model.loading import load_tokenizer
from grpo.training.prompt_lengths import prompt_lengths

SUM = Problem("1", "What is 27 + 35?", "62")


def data(system_prompt=None, examples=(), max_prompt_length=100):
    return {"system_prompt": system_prompt, "examples": examples, "max_prompt_length": max_prompt_length}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig("tiny", "sdpa", "float32", "auto", False))


def test_the_conversation_is_the_system_prompt_and_the_question():
    assert messages(SUM.question, data(" Be brief.\n")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 27 + 35?"},
    ]
    assert messages(SUM.question, data()) == [{"role": "user", "content": "What is 27 + 35?"}]


def test_examples_are_earlier_turns_of_the_conversation():
    shown = data("Be brief.", [{"question": "1 + 1?", "completion": "<answer>2</answer>\n"}])
    assert messages(SUM.question, shown) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<answer>2</answer>"},
        {"role": "user", "content": "What is 27 + 35?"},
    ]


def test_a_prompt_is_the_output_of_the_chat_template_up_to_the_start_of_the_answer(tokenizer):
    conversation = messages(SUM.question, data())
    text = render(tokenizer, conversation)
    answered = [*conversation, {"role": "assistant", "content": "62"}]
    assert "What is 27 + 35?" in text
    assert text != tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.apply_chat_template(answered, tokenize=False).startswith(text + "62")


def test_without_a_chat_template_a_prompt_is_the_plain_text_of_its_messages(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert render(tokenizer, messages(SUM.question, data("Be brief."))) == "Be brief.\n\nWhat is 27 + 35?\n\n"


def test_prompts_that_are_too_long_are_refused_with_the_longest_and_a_suggested_fix(tokenizer):
    longer = Problem("the long one", "What is 27 + 35? How much is 10 + 10?", "62")
    longest = len(tokenizer.encode(render(tokenizer, messages(longer.question, data())), add_special_tokens=False))
    prompt_lengths(tokenizer, [SUM, longer], data(max_prompt_length=longest), len(tokenizer))
    with pytest.raises(ConfigError) as refused:
        prompt_lengths(tokenizer, [SUM, longer, SUM], data(max_prompt_length=longest - 1), len(tokenizer))
    assert str(refused.value) == (
        f"1 of 3 prompts are longer than data.max_prompt_length={longest - 1} tokens, the longest (the long one) "
        f"{longest}; set data.max_prompt_length={longest} or shorten them"
    )


def test_the_system_prompt_counts_towards_the_length(tokenizer):
    alone = len(tokenizer.encode(render(tokenizer, messages(SUM.question, data())), add_special_tokens=False))
    prompt_lengths(tokenizer, [SUM], data(max_prompt_length=alone), len(tokenizer))
    with pytest.raises(ConfigError, match="1 of 1 prompts are longer"):
        prompt_lengths(tokenizer, [SUM], data("How much is it?", max_prompt_length=alone), len(tokenizer))


def problems(count):
    return [Problem(str(number), f"{number}?", "0") for number in range(count)]


def ids_of_steps(count, seed, batch_size, steps):
    sampler = PromptSampler(problems(count), seed)
    return [problem.id for step in steps for problem in sampler.take(step, batch_size).problems]


def test_an_epoch_contains_every_problem_once_even_if_a_batch_spans_two_epochs():
    seen = ids_of_steps(10, seed=1, batch_size=4, steps=range(1, 6))  # 20 problems, two epochs; batch 3 is in both
    everything = sorted(map(str, range(10)))
    assert sorted(seen[:10]) == everything
    assert sorted(seen[10:]) == everything
    assert seen[:10] != seen[10:]


def test_a_batch_larger_than_the_data_set_continues_into_the_next_epochs():
    seen = ids_of_steps(3, seed=1, batch_size=7, steps=[1])
    assert sorted(seen[:3]) == sorted(seen[3:6]) == ["0", "1", "2"]
    assert len(seen) == 7


def test_the_problems_of_a_step_depend_only_on_seed_and_step():
    straight = ids_of_steps(50, seed=3, batch_size=5, steps=range(1, 21))
    assert ids_of_steps(50, seed=3, batch_size=5, steps=[14]) == straight[65:70]
    assert ids_of_steps(50, seed=4, batch_size=5, steps=range(1, 11)) != straight[:50]


def test_a_fork_continues_after_the_problems_of_its_parent_even_with_another_batch_size():
    parent = ids_of_steps(50, seed=3, batch_size=4, steps=range(1, 6))
    fork = PromptSampler(problems(50), 3, {"step": 5, "num_problems": problems_before(6, 4, None)})
    taken = [problem.id for step in range(6, 16) for problem in fork.take(step, 3).problems]
    assert sorted(parent + taken, key=int) == [str(number) for number in range(50)]
    assert problems_before(6, 4, {"step": 2}) == 20  # recorded by an earlier version


def test_the_order_of_an_epoch_sorts_the_problems_by_a_splitmix64_hash():
    mask = 2**64 - 1

    def splitmix(*counters):
        state = 0
        for counter in counters:
            state = (state + 0x9E3779B97F4A7C15 + counter) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        return state

    by_hash = sorted(range(100), key=lambda index: splitmix(7, 2, index))
    assert epoch_order(100, seed=7, epoch=2).tolist() == by_hash
