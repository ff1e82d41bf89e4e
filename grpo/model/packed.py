"""Packed sequences: many sequences in one row (1, tokens) without padding, each prompt once for its whole group.

In a transformer only attention combines different tokens, so only attention needs to know which tokens belong together.
Through transformers' interface for custom attention it is replaced by a function that gets a `Packing`. Prefill and the
training pass use this; `grpo/model/kv_cache.py` is the padded form, which gives the same numbers.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.batch import Completions, Prompts, positions
from grpo.config.errors import ConfigError
from grpo.model.implementation import implementation_of

NAME = "grpo_packed"
# Raised by an architecture whose attention does not support this; the padded form is used for it.
UNSUPPORTED_ATTENTION = (TypeError, AttributeError, KeyError, RuntimeError)
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask")  # of attention, which change its results
# Names of config keys with a number of tokens, and those of the same form with another meaning.
WINDOW = re.compile(r"window(_size|_len)?$|chunk_size$|chunk_length$|topk$|block_size$|^local_attention$")
NO_WINDOW = ("chunk_size_feed_forward", "moe_topk")


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention over padded sequences (S, tokens, heads, d) -> (S, tokens, heads, d); causal if mask is None."""
    grouped = query.shape[2] != key.shape[2]
    if grouped and not _takes_groups(query.device.type, mask is not None):
        key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
        grouped = False
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (S, heads, tokens, d)
    attended = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return attended.transpose(1, 2)


def _takes_groups(device: str, masked: bool) -> bool:
    """Whether to pass torch's attention fewer key heads than query heads: CUDA's fast kernels then take no mask."""
    return device == "cpu" or (device == "cuda" and not masked)


class Packing(Protocol):
    """Defines which tokens of a packed row attend to which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the row's N tokens: query (N, heads, d), key, value (N, key heads, d) -> (N, heads, d)."""


@dataclass(frozen=True)
class VarLen:
    """The layout of S concatenated sequences of different lengths."""

    count: int  # S
    width: int  # tokens of the longest
    slots: Tensor | None  # (tokens,) int64, each token's index in the S * width padded ones; None if all are as long

    @property
    def tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self.count * self.width if self.slots is None else len(self.slots)

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) -> (S, width, ...), each sequence right-padded with zeros."""
        if self.slots is not None:
            x = x.new_zeros(self.count * self.width, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (self.count, self.width))

    def unpad(self, x: Tensor) -> Tensor:
        """(S, width, ...) -> (tokens, ...)."""
        return x.flatten(0, 1) if self.slots is None else x.flatten(0, 1).index_select(0, self.slots)


def varlen(mask: Tensor) -> VarLen:
    """The layout of the tokens of a mask (S, width): 1 for tokens, which may be anywhere in their row."""
    count, width = mask.shape
    if bool(mask.all()):
        return VarLen(count, width, None)
    place = mask.cumsum(dim=1) - 1 + torch.arange(count, device=mask.device)[:, None] * width  # (S, width)
    return VarLen(count, width, place[mask.bool()])


@dataclass(frozen=True)
class PackedPrompts:
    """P prompts, each attending to itself. Keeps their keys and values for decoding."""

    prompts: VarLen
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer, each (P, width, key heads, d)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Packing`."""
        key = self.prompts.pad(key)  # (P, width, key heads, d)
        value = self.prompts.pad(value)  # (P, width, key heads, d)
        self.kept[layer] = key, value
        # Padding is on the right, where causal attention does not look.
        return self.prompts.unpad(_attention(self.prompts.pad(query), key, value, scale))


@dataclass(frozen=True)
class PackedGroups:
    """P prompts followed by n completions, each of which attends to its prompt and to itself."""

    prompts: VarLen
    completions: VarLen
    prompt_of_row: Tensor  # (n,) int64
    mask: Tensor  # (n, 1, width, prompt width + width), 0 where a completion's token attends, -inf elsewhere

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See `Packing`."""
        sizes = [self.prompts.tokens, self.completions.tokens]
        (query, new_query), (key, new_key), (value, new_value) = (x.split(sizes) for x in (query, key, value))
        key = self.prompts.pad(key)  # (P, prompt width, key heads, d)
        value = self.prompts.pad(value)
        of_prompts = self.prompts.unpad(self.attention(self.prompts.pad(query), key, value, scale))
        # (n, prompt width + width, key heads, d)
        key = torch.cat([key.index_select(0, self.prompt_of_row), self.completions.pad(new_key)], dim=1)
        value = torch.cat([value.index_select(0, self.prompt_of_row), self.completions.pad(new_value)], dim=1)
        new = self.attention(self.completions.pad(new_query), key, value, scale, self.mask)
        return torch.cat([of_prompts, self.completions.unpad(new)])

    attention = staticmethod(_attention)


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *,
    scaling: float,
    packing: Packing,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls instead of a model's own attention."""
    for name in UNSUPPORTED_ARGUMENTS:
        if others.get(name) is not None:
            raise TypeError(f"packed rows do not support attention with {name}")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    return packing.attend(module.layer_idx, query, key, value, scaling)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)


def pack_groups(
    prompts: Prompts, completions: Completions, dtype: torch.dtype
) -> tuple[Tensor, Tensor, PackedGroups, Tensor]:
    """Pack P prompts and n completions into one row, for a model of this dtype.

    Returns ids (N,), position_ids (N,), their `PackedGroups`, and for each of the A completion tokens, in order, the
    index in the row whose hidden state predicts it, (A,). The last token of a completion predicts nothing, so the row
    does not contain it.
    """
    prompt_of_row = completions.group
    lengths = prompts.mask.sum(dim=1)  # (P,)
    inputs = completions.attention_mask[:, 1:]  # (n, t), 1 for all tokens but the last of each completion
    ids = torch.cat([prompts.ids[prompts.mask.bool()], completions.ids[:, :-1][inputs.bool()]])  # (N,)
    new_positions = lengths[prompt_of_row][:, None] + torch.arange(inputs.shape[1], device=ids.device)  # (n, t)
    position_ids = torch.cat([positions(prompts.mask)[prompts.mask.bool()], new_positions[inputs.bool()]])  # (N,)

    width = int(lengths.max())
    prompt = varlen(torch.arange(width, device=ids.device) < lengths[:, None])
    rows = varlen(inputs)
    of_prompt = torch.arange(width, device=ids.device) < lengths[prompt_of_row][:, None]  # (n, prompt width)
    causal = torch.ones(rows.width, rows.width, dtype=torch.bool, device=ids.device).tril()  # (t, t)
    n, t = inputs.shape
    mask = torch.cat([of_prompt[:, None].expand(n, t, width), causal.expand(n, t, t)], dim=2)[:, None]
    mask = torch.zeros(mask.shape, dtype=dtype, device=ids.device).masked_fill(~mask, -torch.inf)

    last = lengths.cumsum(dim=0) - 1  # (P,), index of each prompt's last token
    later = int(lengths.sum()) + inputs.flatten().cumsum(dim=0).view(n, t) - 1  # (n, t), index of each new token
    source = torch.cat([last[prompt_of_row][:, None], later], dim=1)[completions.attention_mask.bool()]  # (A,)
    return ids, position_ids, PackedGroups(prompt, rows, prompt_of_row, mask), source


@contextmanager
def _packed_attention(model: PreTrainedModel) -> Iterator[None]:
    former = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = former


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Activation checkpointing: keep only each layer's input; the backward pass computes the layer again.

    Safe for packed rows, whose attention has no side effects; a layer that writes to a cache would write twice.
    transformers' own switch is not used, since it only works in training mode, where dropout is active. Raises
    ConfigError if the model does not support packed rows.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not supports_packing(model):
        raise ConfigError(
            f"hardware.activation_checkpointing=true: {type(model).__name__} with model.attn_implementation="
            f"{model.config._attn_implementation} does not support packed sequences, which this needs; set it to false"
        )
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, model, layer.forward)


def _checkpointed(model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _packed_attention(model):  # it is computed again after `forward_packed` has returned
            return forward(*args, **kwargs)

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether the model uses packed rows in training."""
    return implementation_of(model).training == "packed"


def may_pack(model: PreTrainedModel, max_length: int) -> bool:
    """Whether the model's config allows packed rows for sequences of up to `max_length` tokens.

    False if its attention is not torch's, or does not reach all earlier tokens of such a sequence, or if other layers
    than attention combine tokens.
    """
    config = model.config.get_text_config(decoder=True)
    return (
        model.config._attn_implementation == "sdpa"
        and not any(window < max_length for window in attention_windows(config))
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        and not any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())
    )


def attention_windows(config: PretrainedConfig) -> list[int]:
    """The numbers of tokens, as declared by a text model's config, beyond which some layers do not attend to all.

    These are sliding windows, chunks and the sizes of sparse selections. The chunks of linear attention, which change
    no result, are included.
    """
    values = config.to_dict()
    if values.get("use_sliding_window") is False:
        values.pop("sliding_window", None)
    found = [value for key, value in values.items() if WINDOW.search(key) and key not in NO_WINDOW]
    return sorted({value for value in found if type(value) is int and value > 0})


def forward_packed(model: PreTrainedModel, ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
    """Hidden states (N, H) of the N tokens of a packed row."""
    with _packed_attention(model):
        decoder = model.get_decoder()
        return decoder(input_ids=ids[None], position_ids=position_ids[None], use_cache=False, packing=packing)[0][0]
