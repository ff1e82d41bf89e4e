"""Forward passes with transformers' own key-value cache, which every architecture supports."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from grpo.batch import Prompts, positions


def prefill(model: PreTrainedModel, prompts: Prompts) -> tuple[Tensor, DynamicCache]:
    """Process P prompts once. Returns the last token's hidden state (P, H) and the key-value cache (P rows).

    If gradients are enabled, they flow through the cache, so a group can share its prompt's forward pass in training.
    """
    cache = DynamicCache(config=model.config)
    hidden = extend(model, cache, prompts.ids, prompts.mask, positions(prompts.mask))  # (P, L, H)
    return hidden[:, -1], cache


def extend(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Process L more tokens per row. Returns their hidden states (rows, L, H) and extends the cache.

    ids, position_ids: (rows, L); mask: (rows, length of the cache + L).
    """
    decoder = model.get_decoder()
    cached = {_cache_argument(type(decoder).forward): cache}
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **cached)
    return output.last_hidden_state


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the cache argument: transformers renamed it in 5.24, but remote model code may use the old name."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def select_cache_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep, repeat or reorder the cache's rows in place; rows (N,) int64 may contain a row more than once.

    Uses `index_select` instead of indexing, because its gradient sums repeated rows in a fixed order.
    """
    layers: list[Any] = cache.layers  # each has keys and values, since the cache is not empty
    for layer in layers:
        layer.keys = layer.keys.index_select(0, rows)
        layer.values = layer.values.index_select(0, rows)
