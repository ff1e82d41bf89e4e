"""Prompts for problems: chat messages and their rendered text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.batch import tokenize
from grpo.config.errors import ConfigError, first_line
from grpo.data.problems import Problem

Messages = list[dict[str, str]]


def messages(question: str, data: Mapping[str, Any], turns: Sequence[dict[str, str]] = ()) -> Messages:
    """The conversation for a question: data.system_prompt, data.examples as earlier turns, `turns`, then the question.

    turns: the messages before the question in a data set of chats. If they begin with a system message, it takes the
    place of data.system_prompt.
    """
    system = [message for message in turns[:1] if message["role"] == "system"]
    rest = turns[len(system) :]
    if not system and data["system_prompt"]:
        system = [{"role": "system", "content": data["system_prompt"].strip()}]
    examples = [
        {"role": role, "content": example[key].strip()}
        for example in data["examples"]
        for role, key in (("user", "question"), ("assistant", "completion"))
    ]
    return [*system, *examples, *rest, {"role": "user", "content": question}]


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Messages,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    answered: bool = False,
) -> str:
    """Render a conversation up to the start of the answer; without a chat template, the contents are joined.

    arguments: data.template_arguments. answered: the last message is the answer, so no other one begins.
    Raises ConfigError if the template refuses the conversation or the arguments, or if a text is not valid Unicode.
    """
    for message in conversation:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise ConfigError(f"the {message['role']} message is not valid Unicode: {error}") from None
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in conversation) + "\n\n"
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=not answered, **arguments
        )
    except Exception as error:  # a template can raise any exception
        raise ConfigError(_refused(tokenizer, conversation, error)) from error
    assert isinstance(text, str)  # because tokenize=False
    return text


def _refused(tokenizer: PreTrainedTokenizerBase, conversation: Messages, error: Exception) -> str:
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(templates)
        return f"the model has several chat templates; choose one with +data.template_arguments.chat_template=: {names}"
    if conversation[0]["role"] == "system":
        fix = "if it takes no system message, set data.system_prompt=null"
    else:
        fix = "check data.examples and data.template_arguments"
    return f"the model's chat template refuses the prompt ({first_line(error)}); {fix}"


def template_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the chat template that the config group `data` sets."""
    return data.get("template_arguments") or {}


def check_template_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that the chat template does not use, so that a typing error is noticed."""
    templates = tokenizer.chat_template
    if arguments and templates is None:
        raise ConfigError(f"data.template_arguments: the model has no chat template; remove {', '.join(arguments)}")
    chosen = arguments.get("chat_template")  # an argument of apply_chat_template: the name of a template, or a template
    if isinstance(templates, dict) and chosen is not None and chosen not in templates:
        raise ConfigError(f"data.template_arguments.chat_template={chosen}: must be one of {', '.join(templates)}")
    for name in arguments:
        if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", str(templates)):
            raise ConfigError(f"data.template_arguments.{name}: the model's chat template has no variable {name}")


@dataclass(frozen=True)
class TurnTokens:
    """The tokens with which a chat template formats a turn."""

    special: frozenset[int] = frozenset()  # special tokens that the template writes
    closing: int | None = None  # token that closes an assistant's turn
    closing_text: str = ""  # text after the content of an assistant's turn


def turn_tokens(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] = MappingProxyType({})) -> TurnTokens:
    """Find the tokens of a turn by rendering a question and an answer; empty without a usable chat template.

    `closing` is None if the text after the answer does not begin with a token of the template's own.
    """
    if tokenizer.chat_template is None:
        return TurnTokens()
    answer = "answer42"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = render(tokenizer, conversation, arguments, answered=True)
    except ConfigError:  # it takes no such conversation; the prompts themselves are checked elsewhere
        return TurnTokens()
    after = text.rpartition(answer)[2].strip() if answer in text else ""
    added = tokenizer.added_tokens_decoder  # the special tokens among them need not be in `all_special_ids`
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    written = tokenizer(text, add_special_tokens=False).input_ids
    closing = tokenizer(after, add_special_tokens=False).input_ids[:1]
    closes = bool(closing) and closing[0] in {*special, *added}
    return TurnTokens(frozenset(written) & special, closing[0] if closes else None, after)


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any], vocabulary: int
) -> list[int]:
    """Number of tokens of each problem's prompt. vocabulary: the number of tokens that the model has embeddings for.

    Raises ConfigError if a prompt is refused by the chat template, or has a token that the model lacks.
    """
    arguments = template_arguments(data)
    texts = [render(tokenizer, messages(problem.question, data, problem.turns), arguments) for problem in problems]
    rows = tokenize(tokenizer, texts)
    unknown = {token for ids in rows for token in ids if token >= vocabulary}
    if unknown:
        token = min(unknown)
        raise ConfigError(
            f"the tokenizer does not fit the model: token {token} ({tokenizer.convert_ids_to_tokens(token)}) of the "
            f"prompts is not one of the {vocabulary} that the model has embeddings for; resize the model's embeddings "
            "(resize_token_embeddings) or use its own tokenizer"
        )
    return [len(ids) for ids in rows]


def check_lengths(lengths: Sequence[int], problems: Sequence[Problem], limit: int) -> None:
    """Raise ConfigError if a prompt is empty, or longer than data.max_prompt_length, which is `limit`."""
    too_long = [(length, problem.id) for length, problem in zip(lengths, problems, strict=True) if length > limit]
    if 0 in lengths:
        raise ConfigError("a prompt has no tokens: is the model's folder without its tokenizer (tokenizer.json)?")
    if too_long:
        longest, name = max(too_long)
        raise ConfigError(
            f"{len(too_long)} of {len(problems)} prompts are longer than data.max_prompt_length={limit} tokens, the "
            f"longest ({name}) {longest}; set data.max_prompt_length={longest} or shorten them"
        )
