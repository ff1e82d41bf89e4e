"""The number of tokens of all prompts, kept on disk: to render and tokenize a million prompts takes minutes."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.problems import Problem
from grpo.data.prompts import check_lengths, count_tokens, template_arguments
from grpo.runs.files import disk_errors_are_warnings, write_atomic
from grpo.runs.locations import outputs

logger = logging.getLogger(__name__)
LEAST_PROMPTS = 2000  # fewer are counted in less than a second
RENDERING = ("transformers", "tokenizers", "jinja2")  # packages that can change a prompt


@dataclass(frozen=True)
class PromptLengths:
    """The number of tokens of each prompt, and the file that keeps them for later launches; None: they are not kept."""

    tokens: list[int]
    file: Path | None

    def save(self) -> None:
        """Write the file if there is none. Called when a launch has been accepted, since others leave no file."""
        if self.file is not None and not self.file.exists():
            with disk_errors_are_warnings("the lengths of the prompts"):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.file, json.dumps(self.tokens))


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any], vocabulary: int
) -> PromptLengths:
    """The number of tokens of each problem's prompt, from an earlier launch if it is kept.

    data: the config group. vocabulary: the number of tokens that the model has embeddings for. Raises ConfigError as
    `count_tokens` and `check_lengths` do.
    """
    file = _file(tokenizer, problems, data, vocabulary)
    tokens = _kept(file, len(problems))
    if tokens is None:
        tokens = count_tokens(tokenizer, problems, data, vocabulary)
    check_lengths(tokens, problems, data["max_prompt_length"])
    return PromptLengths(tokens, file)


def _file(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any], vocabulary: int
) -> Path | None:
    """The file for these prompts. Its name is a digest of everything that a prompt's tokens depend on.

    None if there are few prompts, if they may contain the date, or if the tokenizer cannot be written as text.
    """
    if (
        len(problems) < LEAST_PROMPTS
        or not getattr(tokenizer, "is_fast", False)
        or "strftime_now" in str(tokenizer.chat_template)
    ):
        return None
    facts = {
        "tokenizer": [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.eos_token],
        "data": [data["system_prompt"], data["examples"], template_arguments(data)],
        "vocabulary": vocabulary,
        "versions": {name: version(name) for name in RENDERING},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for problem in problems:
        digest.update(json.dumps([problem.question, problem.turns]).encode())
    return outputs() / "prompt_lengths" / f"{digest.hexdigest()[:32]}.json"


def _kept(file: Path | None, count: int) -> list[int] | None:
    """The lengths in the file; None if there is none, or if it is damaged."""
    if file is None or not file.exists():
        return None
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("the lengths of the prompts are counted again: %s: %s", file, error)
        return None
    valid = isinstance(tokens, list) and len(tokens) == count and all(type(each) is int for each in tokens)
    return tokens if valid else None
