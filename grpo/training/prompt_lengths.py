"""The number of tokens of all prompts, kept on disk: to render and tokenize a million prompts takes minutes."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo.data.problems import Problem
from grpo.data.prompts import check_lengths, count_tokens, template_arguments
from grpo.runs.files import disk_errors_are_warnings
from grpo.runs.locations import outputs

logger = logging.getLogger(__name__)
LEAST_PROMPTS = 2000  # fewer are counted in less than a second
FORMAT = 1  # to be raised when grpo.data.prompts renders prompts in another way
RENDERING = ("transformers", "tokenizers", "jinja2")  # packages that can change a prompt


@dataclass(frozen=True)
class PromptLengths:
    """The number of tokens of each prompt."""

    tokens: list[int]
    file: Path | None = None  # to store them in for later launches; None: they are stored, or not to be stored

    def save(self) -> None:
        """Keep the lengths. Called when a launch has been accepted, since one that is refused leaves no file."""
        if self.file is None:
            return
        with disk_errors_are_warnings("the lengths of the prompts"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_suffix(f".{os.getpid()}.tmp")  # a name of its own, since jobs may run at once
            try:
                temporary.write_text(json.dumps(self.tokens))
                temporary.replace(self.file)
            finally:
                temporary.unlink(missing_ok=True)  # what a full disk has left


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any], vocabulary: int
) -> PromptLengths:
    """The number of tokens of each problem's prompt, from an earlier launch if it is kept.

    data: the config group. vocabulary: the number of tokens that the model has embeddings for. Raises ConfigError as
    `count_tokens` and `check_lengths` do.
    """
    file = _file(tokenizer, problems, data, vocabulary)
    kept = _read(file, len(problems)) if file is not None else None
    tokens = count_tokens(tokenizer, problems, data, vocabulary) if kept is None else kept
    check_lengths(tokens, problems, data["max_prompt_length"])
    return PromptLengths(tokens, file if kept is None else None)


def _file(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], data: Mapping[str, Any], vocabulary: int
) -> Path | None:
    """The file for these prompts. Its name is a digest of everything that a prompt's tokens depend on.

    None if there are few prompts, if they may contain the date, or if code outside transformers tokenizes them.
    """
    arguments = template_arguments(data)
    has_date = any("strftime" in str(text) for text in (tokenizer.chat_template, *arguments.values()))
    is_known = type(tokenizer).__module__.startswith("transformers.") and getattr(tokenizer, "is_fast", False)
    if len(problems) < LEAST_PROMPTS or has_date or not is_known:
        return None
    facts = {
        "format": FORMAT,
        "versions": {name: version(name) for name in RENDERING},
        "tokenizer": [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map],
        "split": tokenizer.split_special_tokens,
        "data": [data["system_prompt"], data["examples"], arguments],
        "vocabulary": vocabulary,
    }
    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for problem in problems:
        digest.update(json.dumps([problem.question, problem.turns]).encode())
    return outputs() / "prompt_lengths" / f"{digest.hexdigest()[:32]}.json"


def _read(file: Path, count: int) -> list[int] | None:
    """The lengths in a file; None if it does not exist or is damaged."""
    try:
        tokens = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the lengths of the prompts are counted again: %s: %s", file, error)
        return None
    valid = isinstance(tokens, list) and len(tokens) == count and all(type(each) is int and each > 0 for each in tokens)
    return tokens if valid else None
