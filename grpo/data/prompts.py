"""Prompts for problems: chat messages and their rendered text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.config.errors import ConfigError
from grpo.data.problems import Problem

Messages = list[dict[str, str]]


def messages(question: str, data: Mapping[str, Any]) -> Messages:
    """The conversation for a question: data.system_prompt, data.examples as earlier turns, then the question."""
    system = [{"role": "system", "content": data["system_prompt"].strip()}] if data["system_prompt"] else []
    turns = [
        {"role": role, "content": example[key].strip()}
        for example in data["examples"]
        for role, key in (("user", "question"), ("assistant", "completion"))
    ]
    return [*system, *turns, {"role": "user", "content": question}]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Messages) -> str:
    """Render a conversation up to the start of the answer; without a chat template, the contents are joined."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in conversation) + "\n\n"
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # because tokenize=False
    return text


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any]
) -> list[int]:
    """Number of tokens of each problem's prompt.

    Raises ConfigError if a prompt is empty, longer than data.max_prompt_length, or refused by the chat template.
    """
    limit = data["max_prompt_length"]
    try:
        texts = [render(tokenizer, messages(problem.question, data)) for problem in problems]
    except TemplateError as error:
        raise ConfigError(
            f"the model's chat template refuses the prompt ({error}); if it takes no system message, set "
            "data.system_prompt=null"
        ) from error
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    too_long = [(length, problem.id) for length, problem in zip(lengths, problems, strict=True) if length > limit]
    if 0 in lengths:
        raise ConfigError("a prompt has no tokens: is the model's folder without its tokenizer (tokenizer.json)?")
    if too_long:
        longest, name = max(too_long)
        raise ConfigError(
            f"{len(too_long)} of {len(problems)} prompts are longer than data.max_prompt_length={limit} tokens, the "
            f"longest ({name}) {longest}; set data.max_prompt_length={longest} or shorten them"
        )
    return lengths
