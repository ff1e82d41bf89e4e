"""Token ids as the engine hands them over: prompts, and the completions that answer them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, padded on the left to the longest."""

    ids: Tensor  # (P, L) int64
    mask: Tensor  # (P, L) int64, 1 where a token is


@dataclass(frozen=True)
class CompletionBatch:
    """B = P * G completions, padded on the right; row b answers prompt b // G."""

    ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 through the first end-of-sequence token, inclusive
    sampling_logps: Tensor | None = None  # (B, T) float32, as the sampling found them; 0 outside the mask


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], device: torch.device) -> PromptBatch:
    """Rendered prompts as one left-padded batch. Special tokens are part of the text, none are added."""
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return PromptBatch(encoded.input_ids.to(device), encoded.attention_mask.to(device))


def positions(mask: Tensor) -> Tensor:
    """Position of each token (rows, L), counted from the row's first real token."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def split_rows(prompt_lengths: Tensor, prompt_of_row: Tensor, row_lengths: Tensor | int, budget: int) -> list[Tensor]:
    """Cut n rows, ordered by prompt, into parts of at most `budget` tokens; a part is never less than one row.

    prompt_lengths (P,), prompt_of_row (n,); row_lengths (n,), or one for all. A prompt counts once in each part that
    has a row of it. Returns the rows of each part, (m,) int64.
    """
    lengths = row_lengths.tolist() if isinstance(row_lengths, Tensor) else [row_lengths] * len(prompt_of_row)
    prompts, prompt_lengths = prompt_of_row.tolist(), prompt_lengths.tolist()
    starts, used = [0], 0
    for row, length in enumerate(lengths):
        needed = length + (prompt_lengths[prompts[row]] if row == starts[-1] or prompts[row] != prompts[row - 1] else 0)
        if used + needed > budget and row > starts[-1]:
            starts.append(row)
            used, needed = 0, length + prompt_lengths[prompts[row]]
        used += needed
    return [
        torch.arange(start, stop, device=prompt_of_row.device)
        for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)
    ]
