"""From problems to prompts: chat messages and their rendered text."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from grpo.config.errors import ConfigError
from grpo.data.problems import Problem

Messages = list[dict[str, str]]


def messages(question: str, data: Mapping[str, Any]) -> Messages:
    """The conversation that asks a question: data.system_prompt, data.examples as earlier turns, the question."""
    system = [{"role": "system", "content": data["system_prompt"].strip()}] if data["system_prompt"] else []
    turns = [
        {"role": role, "content": example[key].strip()}
        for example in data["examples"]
        for role, key in (("user", "question"), ("assistant", "completion"))
    ]
    return [*system, *turns, {"role": "user", "content": question}]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Messages) -> str:
    """The text that a model reads, up to where its answer begins. Without a chat template: the plain contents."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in conversation) + "\n\n"
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # since it was not to tokenize
    return text


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any]
) -> list[int]:
    """Tokens of each prompt. Raises ConfigError naming the longest where it has more than data.max_prompt_length."""
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
