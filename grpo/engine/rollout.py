"""Sampling completions: each prompt is read once for its whole group, finished rows leave the batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo.engine.model import CompletionBatch, PromptBatch, extend, positions, prefill, select_cache_rows
from grpo.engine.noise import gumbel_noise, row_keys

COMPACT_BELOW = 0.75  # finished rows are dropped once fewer than this share of the rows is still running


@dataclass(frozen=True)
class Sampling:
    """How to draw completions. `temperature=0` is greedy decoding, which needs no noise."""

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    min_new_tokens: int = 0


@torch.no_grad()
def rollout(
    model: PreTrainedModel,
    prompts: PromptBatch,
    num_generations: int,
    sampling: Sampling,
    *,
    seed: int,
    step: int,
    rows_at_once: int,
) -> CompletionBatch:
    """Sample `num_generations` completions for each of P prompts -> B = P * num_generations rows.

    The noise of every token comes from the counter (seed, step, slot of the prompt in the batch, completion,
    token, vocabulary index), so a completion does not depend on which rows are decoded together (`rows_at_once`
    at most, to bound memory) beyond the rounding of the model itself.
    """
    slots, members = np.divmod(np.arange(len(prompts.ids) * num_generations), num_generations)
    keys = row_keys(seed, step, slots, members).to(prompts.ids.device)
    prompt_of_row = torch.from_numpy(slots).to(prompts.ids.device)
    chunks = zip(prompt_of_row.split(rows_at_once), keys.split(rows_at_once), strict=True)
    parts = [_decode(model, *_take_prompts(prompts, chunk), chunk_keys, sampling) for chunk, chunk_keys in chunks]

    longest = max(ids.shape[1] for ids in parts)
    ids = torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[1]), value=sampling.pad_id) for p in parts])
    return CompletionBatch(ids, completion_mask(ids, sampling.stop_ids))


def completion_mask(ids: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """1 through the first end-of-sequence token, inclusive; all ones where there is none. (B, T) -> (B, T) int64."""
    stop = torch.isin(ids, torch.tensor(stop_ids, device=ids.device)).long()
    return (stop.cumsum(dim=1) - stop == 0).long()


def _take_prompts(prompts: PromptBatch, prompt_of_row: Tensor) -> tuple[PromptBatch, Tensor]:
    """Only the prompts that these rows answer, and each row's place among them."""
    used, place = prompt_of_row.unique(return_inverse=True)
    return PromptBatch(prompts.ids[used], prompts.mask[used]), place


def _decode(
    model: PreTrainedModel, prompts: PromptBatch, prompt_of_row: Tensor, keys: Tensor, sampling: Sampling
) -> Tensor:
    """Decode one chunk of rows together. Returns token ids (rows, T), padded after each row's end."""
    hidden, cache = prefill(model, prompts)
    select_cache_rows(cache, prompt_of_row)
    hidden = hidden.index_select(0, prompt_of_row)
    prompt_mask = prompts.mask.index_select(0, prompt_of_row)
    width, device = prompt_mask.shape[1], prompt_mask.device
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(keys), sampling.max_new_tokens)], dim=1)
    next_position = positions(prompt_mask)[:, -1:] + 1

    stop_ids = torch.tensor(sampling.stop_ids, device=device)
    ids = torch.full((len(keys), sampling.max_new_tokens), sampling.pad_id, device=device)
    running = torch.arange(len(keys), device=device)  # the rows of `ids` that this batch still works on
    ended = torch.zeros(len(keys), dtype=torch.bool, device=device)
    # Looking at `ended` makes an accelerator wait for its queue; there it is worth it only now and then.
    look_every = 1 if device.type == "cpu" else 16

    head = model.get_output_embeddings()
    for t in range(sampling.max_new_tokens):
        tokens = _choose(head(hidden).float(), keys, t, sampling, stop_ids)
        tokens = torch.where(ended, sampling.pad_id, tokens)
        ids[running, t] = tokens
        ended = ended | torch.isin(tokens, stop_ids)
        if t + 1 == sampling.max_new_tokens:
            break
        if (t + 1) % look_every == 0:
            alive = (~ended).nonzero().squeeze(1)
            if len(alive) == 0:
                return ids[:, : t + 1]
            if len(alive) < COMPACT_BELOW * len(ended):
                select_cache_rows(cache, alive)
                running, ended, keys, mask = running[alive], ended[alive], keys[alive], mask[alive]
                tokens, next_position = tokens[alive], next_position[alive]
        hidden = extend(model, cache, tokens[:, None], mask[:, : width + t + 1], next_position + t)[:, -1]
    return ids


def _choose(logits: Tensor, keys: Tensor, t: int, sampling: Sampling, stop_ids: Tensor) -> Tensor:
    """The next token (rows,) from float32 logits (rows, vocabulary): greedy, or Gumbel-max with counter noise."""
    if t < sampling.min_new_tokens:
        logits = logits.index_fill(1, stop_ids, -torch.inf)
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    return (logits / sampling.temperature + gumbel_noise(keys, t, logits.shape[1])).argmax(dim=1)
