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
    cache = new_cache(model)
    hidden = extend(model, cache, prompts.ids, prompts.mask, positions(prompts.mask))  # (P, L, H)
    return hidden[:, -1], cache


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for the model."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def extend(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Process L more tokens per row. Returns their hidden states (rows, L, H) and extends the cache.

    ids, position_ids: (rows, L); mask: (rows, length of the cache + L).
    """
    decoder = model.get_decoder()
    cached = {cache_argument(decoder): cache}
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **cached)
    return output.last_hidden_state


def cache_argument(decoder: Any) -> str:
    """The name of the cache argument: transformers renamed it in 5.24, but remote model code may use the old name."""
    return _cache_argument(type(decoder).forward)


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def select_cache_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep, repeat or reorder the cache's rows in place; rows (N,) int64 may contain a row more than once.

    transformers uses `index_select` here, whose gradient sums repeated rows in a fixed order.
    """
    cache.reorder_cache(rows)  # type: ignore[arg-type]  # a LongTensor is a Tensor of int64
