"""Reading with transformers' own cache of keys and values: the plain way, which every architecture knows."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from grpo.batch import Prompts, positions


def prefill(model: PreTrainedModel, prompts: Prompts) -> tuple[Tensor, DynamicCache]:
    """Read P prompts once. Returns the last token's hidden state (P, H) and the keys and values (P rows).

    With gradient enabled the cache carries it, so a whole group can share its prompt's forward pass in training.
    """
    cache = DynamicCache(config=model.config)
    hidden = extend(model, cache, prompts.ids, prompts.mask, positions(prompts.mask))
    return hidden[:, -1], cache


def extend(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
    """Read more tokens. Returns their hidden states (rows, L, H) and adds their keys and values to the cache.

    ids, position_ids: (rows, L); mask: (rows, length of the cache + L).
    """
    decoder = model.get_decoder()
    cached = {_cache_argument(type(decoder).forward): cache}
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, **cached)
    return output.last_hidden_state


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """Transformers renamed it in 5.24; a model that comes with its own code may have the older name in any version."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def select_cache_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep, repeat or reorder the cache's rows in place; rows (N,) int64 may name a row more than once.

    `index_select` and not indexing, because its gradient adds up repeated rows in a fixed order.
    """
    layers: list[Any] = cache.layers  # each with keys and values, since tokens have been read
    for layer in layers:
        layer.keys = layer.keys.index_select(0, rows)
        layer.values = layer.values.index_select(0, rows)
