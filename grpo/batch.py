"""Batches of token ids: prompts, and completions of these prompts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """A batch of P prompts, left-padded to the longest."""

    ids: Tensor  # (P, L) int64
    mask: Tensor  # (P, L) int64, 1 for tokens, 0 for padding

    def take(self, prompt_of_row: Tensor) -> "tuple[Prompts, Tensor]":
        """The prompts at `prompt_of_row` (n,), each once, padded to the longest; and each row's index in them (n,)."""
        used, place = prompt_of_row.unique(return_inverse=True)  # (p,), (n,)
        start = self.ids.shape[1] - int(self.mask[used].sum(dim=1).max())
        return Prompts(self.ids[used, start:], self.mask[used, start:]), place


@dataclass(frozen=True)
class Completions:
    """A batch of B completions of P prompts, right-padded; the completions of a prompt are adjacent."""

    ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 up to and including the first end-of-sequence token, 0 for padding
    # (B, T) int64, 1 for tokens that count in the loss; 0 for padding and for tokens that the policy did not generate,
    # such as a tool's answer.
    completion_mask: Tensor
    group: Tensor  # (B,) int64, index of each completion's prompt
    sampling_logps: Tensor | None = None  # (B, T) float32, log-probabilities at sampling; 0 outside attention_mask
    columns: dict[str, list[Any]] = field(default_factory=dict)  # for the reward functions, B values each

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each completion, (B,) int64."""
        return self.attention_mask.sum(dim=1)

    def select(self, rows: Tensor) -> "Completions":
        """The completions at `rows` (n,) int64, padded to the longest of them."""
        width = int(self.lengths[rows].max())
        return Completions(
            ids=self.ids[rows, :width],
            attention_mask=self.attention_mask[rows, :width],
            completion_mask=self.completion_mask[rows, :width],
            group=self.group[rows],
            sampling_logps=None if self.sampling_logps is None else self.sampling_logps[rows, :width],
            columns={name: [values[row] for row in rows.tolist()] for name, values in self.columns.items()},
        )


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device) -> Prompts:
    """Tokenize rendered prompts into one left-padded batch."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in tokenize(tokenizer, texts)]
    pad = tokenizer.pad_token_id
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")  # (P, L)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    return Prompts(ids.to(device), mask.to(device))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of rendered prompts.

    Special tokens are added only without a chat template, which writes its own. If the tokenizer adds an
    end-of-sequence token after a text, it is removed, since the completion follows there.
    """
    plain = tokenizer.chat_template is None
    rows = tokenizer(texts, add_special_tokens=plain).input_ids
    return [ids[:-1] if plain and ids[-1:] == [tokenizer.eos_token_id] else ids for ids in rows]


def positions(mask: Tensor) -> Tensor:
    """Position ids (rows, L), counted from the first token of each row; 0 for padding before it."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def split_rows(
    prompt_lengths: Tensor, prompt_of_row: Tensor, row_lengths: Tensor | int, budget: int, shared: bool
) -> list[Tensor]:
    """Split n rows, ordered by prompt, into parts of at most `budget` tokens, or of one row if it is longer.

    prompt_lengths: (P,); prompt_of_row: (n,); row_lengths: (n,), or one length for all rows. shared: count a prompt
    once per part instead of once per row. Returns the row indices of each part, (m,) int64.

    The size of a part with padding (every row as long as its longest prompt plus its longest row) is limited as well:
    to 2 budgets if not shared, where the whole model computes on padding; to 8 if shared, where only attention does,
    whose share of the memory per token is small.
    """
    lengths: list[int] = row_lengths.tolist() if isinstance(row_lengths, Tensor) else [row_lengths] * len(prompt_of_row)
    prompts: list[int] = prompt_of_row.tolist()
    of_prompt: list[int] = prompt_lengths.tolist()
    starts = [0]
    used = 0
    longest = 0
    longest_prompt = 0
    for row, length in enumerate(lengths):
        new = row == starts[-1] or not shared or prompts[row] != prompts[row - 1]
        prompt = of_prompt[prompts[row]]
        needed = length + (prompt if new else 0)
        padded = (row + 1 - starts[-1]) * (max(longest, length) + max(longest_prompt, prompt))
        if row > starts[-1] and (used + needed > budget or padded > (8 if shared else 2) * budget):
            starts.append(row)
            used = 0
            longest = 0
            longest_prompt = 0
            needed = length + prompt
        used = used + needed
        longest = max(longest, length)
        longest_prompt = max(longest_prompt, prompt)
    return [
        torch.arange(start, stop, device=prompt_of_row.device)
        for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)
    ]
