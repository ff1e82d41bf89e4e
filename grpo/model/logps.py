"""Log-probabilities of completions under a model, with gradient if it is enabled."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from grpo.batch import Completions, Prompts, positions
from grpo.model.implementation import implementation_of
from grpo.model.kv_cache import extend, prefill, select_cache_rows
from grpo.model.lm_head import Entropy, HeadLogps, logits_per_chunk, soft_cap
from grpo.model.packed import forward_packed, pack_groups


@dataclass(frozen=True)
class TokenLogps:
    """Log-probabilities and entropies of B completions at the sampling temperature; 0 outside the attention mask."""

    logps: Tensor  # (B, T) float32, log-probability of each token
    entropy: Tensor  # (B, T) float32, in nats, of the distribution of each token; 0 if not requested


def completion_logps(
    model: PreTrainedModel,
    prompts: Prompts,
    completions: Completions,
    temperature: float,
    entropy: Entropy = "value",
) -> TokenLogps:
    """Log-probabilities of B completions' tokens. Each prompt is processed once for all of its completions.

    If gradients are enabled, they also flow through the shared prompt.
    """
    chosen = implementation_of(model)
    if chosen.training == "packed":
        ids, position_ids, packing, source = pack_groups(prompts, completions, model.dtype)
        hidden = forward_packed(model, ids, position_ids, packing).index_select(0, source)  # (A, H)
    else:
        compute = _hidden_by_cache if chosen.training == "cached" else _hidden_in_full
        hidden = compute(model, prompts, completions)[completions.attention_mask.bool()]  # (A, H)
    mask = completions.attention_mask
    active = mask.flatten().nonzero().squeeze(1)  # (A,), indices of the completions' tokens
    targets = completions.ids.flatten().index_select(0, active)  # (A,)
    empty = torch.zeros(mask.numel(), dtype=torch.float32, device=hidden.device)
    found = head_logps(
        model.get_output_embeddings(), hidden, targets, temperature / chosen.logit_scale, entropy, chosen.logit_cap
    )
    return TokenLogps(*(empty.index_copy(0, active, values).view(mask.shape) for values in found))


def _hidden_by_cache(model: PreTrainedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """The hidden state (B, T, H) that predicts each token; prompts are shared through a cache with gradient."""
    last_hidden, cache = prefill(model, prompts)
    select_cache_rows(cache, completions.group)
    prompt_mask = prompts.mask.index_select(0, completions.group)
    mask = torch.cat([prompt_mask, completions.attention_mask[:, :-1]], dim=1)
    hidden = last_hidden.index_select(0, completions.group)[:, None]  # (B, 1, H)
    if completions.ids.shape[1] == 1:
        return hidden
    new_positions = positions(mask)[:, prompt_mask.shape[1] :]  # (B, T - 1)
    return torch.cat([hidden, extend(model, cache, completions.ids[:, :-1], mask, new_positions)], dim=1)


def _hidden_in_full(model: PreTrainedModel, prompts: Prompts, completions: Completions) -> Tensor:
    """The hidden state (B, T, H) that predicts each token; each row is its prompt, its completion, then padding.

    Padding at the end changes nothing in a causal model, so neither a mask nor positions are passed.
    """
    ids = torch.cat([prompts.ids[completions.group], completions.ids[:, :-1]], dim=1)  # (B, L + T - 1)
    lengths = prompts.mask.sum(dim=1)[completions.group]  # (B,)
    padding = prompts.ids.shape[1] - lengths  # (B,), before each prompt
    columns = torch.arange(ids.shape[1], device=ids.device)  # (L + T - 1,)
    ids = ids.gather(1, (columns + padding[:, None]) % ids.shape[1])
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, L + T - 1, H)
    predicting = lengths[:, None] - 1 + torch.arange(completions.ids.shape[1], device=ids.device)  # (B, T)
    rows = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]  # (B, 1)
    return hidden.flatten(0, 1).index_select(0, (rows + predicting).flatten()).unflatten(0, predicting.shape)


def head_logps(
    head: Any, hidden: Tensor, targets: Tensor, temperature: float, entropy: Entropy = "value", cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (A,) of the targets (A,), and entropies (A,), from the hidden states (A, H) that predict them.

    cap: the soft cap of the logits (`Implementation.logit_cap`). The head is applied again in the backward pass, so
    that the logits (A, V) never exist at once.
    """
    if isinstance(head, nn.Linear) and head.bias is None and cap is None:
        return HeadLogps.apply(hidden, head.weight, targets, temperature, entropy)
    chunk = max(1, logits_per_chunk(hidden.device.type) // head.weight.shape[0])
    parts = [
        checkpoint(_chunk_logps, head, h, t, temperature, entropy, cap, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    logps, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
    return logps, entropies


def _chunk_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, entropy: Entropy, cap: float | None
) -> tuple[Tensor, Tensor]:
    logits = head(hidden) if cap is None else soft_cap(head(hidden), cap)  # (chunk, V)
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    if entropy == "none":
        entropies = logps.new_zeros(len(logps))
    else:
        of_logps = logps if entropy == "gradient" else logps.detach()
        entropies = -(of_logps.exp() * of_logps).sum(dim=-1)
    return logps.gather(1, targets[:, None]).squeeze(1), entropies
