"""Token ids as they are handed over: prompts, and the completions that answer them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """P prompts, padded on the left to the longest."""

    ids: Tensor  # (P, L) int64
    mask: Tensor  # (P, L) int64, 1 where a token is

    def take(self, prompt_of_row: Tensor) -> "tuple[Prompts, Tensor]":
        """The prompts that some rows answer, padded to the longest of them, and each row's place among them (n,)."""
        used, place = prompt_of_row.unique(return_inverse=True)
        start = self.ids.shape[1] - int(self.mask[used].sum(dim=1).max())
        return Prompts(self.ids[used, start:], self.mask[used, start:]), place


@dataclass(frozen=True)
class Completions:
    """B completions of P prompts, padded on the right; those of a prompt stand next to each other."""

    ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 where a token is: through the first end-of-sequence token, inclusive
    # (B, T) int64, 1 where a token counts in the loss; 0 also for tokens that the policy did not write, such as a
    # tool's answer.
    completion_mask: Tensor
    group: Tensor  # (B,) int64, the row of the prompt that each completion answers
    sampling_logps: Tensor | None = None  # (B, T) float32, log-probabilities when sampled; 0 outside attention_mask
    columns: dict[str, list[Any]] = field(default_factory=dict)  # B values each, for the reward functions

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion, (B,) int64."""
        return self.attention_mask.sum(dim=1)

    def select(self, rows: Tensor) -> "Completions":
        """The completions of these rows (n,) int64, padded to the longest of them."""
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
    """Rendered prompts as one left-padded batch. Special tokens are part of the text, none are added."""
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return Prompts(encoded.input_ids.to(device), encoded.attention_mask.to(device))


def positions(mask: Tensor) -> Tensor:
    """Position of each token (rows, L), counted from the row's first real token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def split_rows(
    prompt_lengths: Tensor, prompt_of_row: Tensor, row_lengths: Tensor | int, budget: int, shared: bool
) -> list[Tensor]:
    """Split n rows, ordered by prompt, into parts of at most `budget` tokens; a part is never less than one row.

    prompt_lengths (P,), prompt_of_row (n,); row_lengths (n,), or one for all. A prompt counts once in each part that
    has a row of it where it is shared, else for every row. Returns the rows of each part, (m,) int64.

    Padded to the longest prompt and row of their part, its rows take no more than a few budgets: two where all of a
    model works on padding, eight where only attention does, which holds a small part of what a token holds.
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
