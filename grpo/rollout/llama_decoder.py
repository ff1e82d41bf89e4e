"""Fast decoding for the Llama family: its layers written with few operations, for one token per row.

With one token per row, most of the time is spent on launching operations and reading weights. A layer therefore has
about twenty operations instead of seventy, layers with the same input are fused and use reordered weights, and a
prompt's keys and values are stored and read once for its whole group. `CachedDecoder` in `grpo/rollout/native.py` is
the simple form, for any architecture; `CompiledDecoder` is the same in C, for processors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from grpo.batch import Prompts, positions
from grpo.model.implementation import LLAMA_FAMILY, implementation_of, module_of_family
from grpo.model.linear import has_onednn, is_left_to_torch, is_small, onednn_linear, reorder_weight
from grpo.model.lora import low_rank
from grpo.model.packed import PackedPrompts, VarLen, forward_packed, varlen
from grpo.model.threads import threads_for, use_threads

SUPPORTED = {f"{module_of_family(name)}.{name}Model" for name in LLAMA_FAMILY}


def supports_fast_decoding(model: PreTrainedModel) -> bool:
    """Whether `FastDecoder` supports a model that supports packed rows."""
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    linear = (m for m in decoder.modules() if hasattr(m, "in_features"))
    return (
        f"{type(decoder).__module__}.{type(decoder).__qualname__}" in SUPPORTED  # remote code may use the same names
        and decoder.config.hidden_act == "silu"
        and isinstance(head, nn.Linear)
        and all(isinstance(getattr(m, "base_layer", m), nn.Linear) for m in linear)
    )


class FusedLinear:
    """Linear layers that have the same input, fused: their outputs are concatenated. For a few rows at a time."""

    def __init__(self, rows: int, *layers: Any) -> None:
        self._added = _fused_lora_factors(layers)
        self._linear: list[nn.Linear] = [getattr(layer, "base_layer", layer) for layer in layers]
        self._weight: Tensor | None = None
        self._reordered: Tensor | None = None
        self._bias: Tensor | None = None
        self._threads = torch.get_num_threads()
        if has_onednn(self._linear[0].weight):
            weight = torch.cat([linear.weight for linear in self._linear])  # (outputs of all layers, inputs)
            if self._added is not None and weight.dtype == self._added[1].dtype:  # else it would lose precision
                down, up = self._added
                weight = weight.addmm_(up, down)
                self._added = None
            self._reordered = reorder_weight(weight, rows)
            self._weight = weight if is_small(weight) else None
            if self._linear[0].bias is not None:
                self._bias = torch.cat([linear.bias for linear in self._linear])

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs of all layers)."""
        if self._weight is not None and is_left_to_torch(x, self._weight):
            y = F.linear(x, self._weight, self._bias)
        elif self._reordered is not None:
            before = torch.get_num_threads()
            torch.set_num_threads(self._threads)
            y = onednn_linear(x, self._reordered, self._bias)
            torch.set_num_threads(before)
        else:
            y = torch.cat([F.linear(x, linear.weight, linear.bias) for linear in self._linear], dim=-1)
        if self._added is None:
            return y
        down, up = self._added
        return torch.addmm(y.to(up.dtype), x.to(down.dtype) @ down.t(), up.t()).to(y.dtype)


def _fused_lora_factors(layers: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """LoRA's factors for all of these layers together, (ranks, inputs) and (outputs, ranks); None without LoRA."""
    factors = [low_rank(layer) for layer in layers]
    if not any(factors):
        return None
    empty = [layer.weight.new_zeros(layer.out_features, 0) for layer in layers]
    ups = [factor[1] if factor else none for factor, none in zip(factors, empty, strict=True)]
    return torch.cat([factor[0] for factor in factors if factor]), torch.block_diag(*ups)


def read_prompts(model: PreTrainedModel, prompts: Prompts) -> tuple[Tensor, PackedPrompts]:
    """The hidden states of the last tokens of P prompts, (P, H), and the prompts' keys and values."""
    lengths = prompts.mask.sum(dim=1)  # (P,)
    real = prompts.mask.bool()
    packing = PackedPrompts(varlen(torch.arange(int(lengths.max()), device=real.device) < lengths[:, None]))
    hidden = forward_packed(model, prompts.ids[real], positions(prompts.mask)[real], packing)  # (tokens, H)
    return hidden[lengths.cumsum(dim=0) - 1], packing


@dataclass
class Layer:
    """A layer of the model, its fused weights, and the keys and values so far."""

    module: Any  # the transformers layer
    qkv: FusedLinear
    output: FusedLinear
    gate_up: FusedLinear
    down: FusedLinear
    prompt_keys: Tensor  # (P * key heads, width, d)
    prompt_values: Tensor  # (P * key heads, width, d)
    keys: Tensor  # (R, key heads, max new tokens, d), of each row's own tokens
    values: Tensor  # (R, key heads, max new tokens, d)


class FastDecoder:
    """Decodes R rows, which are ordered by prompt; `logits` (R, V) are those of the next token."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_of_row: Tensor, max_tokens: int) -> None:
        hidden, packing = read_prompts(model, prompts)
        hidden = hidden[prompt_of_row]  # (R, H)
        lengths = prompts.mask.sum(dim=1)  # (P,)
        rows = len(prompt_of_row)
        self._decoder = model.get_decoder()
        config = self._decoder.config
        self._heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._first_position = lengths[prompt_of_row]
        self._length = 0
        self._prompt_of_row = prompt_of_row
        self._groups = rows_by_prompt(prompt_of_row, len(lengths))
        chosen = implementation_of(model)
        assert (chosen.logit_scale, chosen.logit_cap) == (1.0, None)  # as in the whole family
        self._head = FusedLinear(rows, model.get_output_embeddings())
        self._layers = [
            _layer(module, packing.kept[number], rows, max_tokens) for number, module in enumerate(self._decoder.layers)
        ]
        self._bias = hidden.new_zeros(1, 1, 1)
        if packing.prompts.slots is not None:  # masks the padding of the shorter prompts
            beyond = torch.arange(packing.prompts.width, device=lengths.device) >= lengths[:, None]
            bias = hidden.new_zeros(beyond.shape).masked_fill(beyond, -torch.inf)
            self._bias = bias.repeat_interleave(self._key_heads, dim=0)[:, None]  # (P * key heads, 1, W)
        self._no_bias = hidden.new_zeros(1, 1, 1)
        self._threads = torch.get_num_threads()
        self.logits = self._head(hidden)

    def read(self, tokens: Tensor) -> None:
        """Process one more token of each row, (R,), and update `logits`."""
        with use_threads(self._threads_for_attention()):
            self.logits = self._read(tokens)
        self._length += 1

    def _threads_for_attention(self) -> int:
        """The number of threads for attention and the small operations of a layer."""
        prompt = self._layers[0].prompt_keys
        row = self._heads * prompt.shape[2] * (prompt.shape[1] + self._length + 1)
        return threads_for(len(self._prompt_of_row) * row, self._threads)

    def _read(self, tokens: Tensor) -> Tensor:
        """The logits (R, V) after these tokens (R,)."""
        x = self._decoder.embed_tokens(tokens)  # (R, H)
        cos, sin = (a[0, :, None] for a in self._decoder.rotary_emb(x, (self._first_position + self._length)[None]))
        first, second = sin.chunk(2, dim=-1)
        rotation = cos, torch.cat([-first, second], dim=-1)
        for layer in self._layers:
            x = x + layer.output(self._attend(layer, _norm(layer.module.input_layernorm, x), rotation))
            gate, up = layer.gate_up(_norm(layer.module.post_attention_layernorm, x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self._head(_norm(self._decoder.norm, x))

    def _attend(self, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attention, (R, H) -> (R, heads * d); W: padded length of a prompt, t: positions of a row's own tokens."""
        attention = layer.module.self_attn
        heads = self._heads
        key_heads = self._key_heads
        rows = len(x)
        x = layer.qkv(x).view(rows, heads + 2 * key_heads, -1)  # (R, heads + 2 key heads, d)
        rotated = x[:, : heads + key_heads]  # (R, heads + key heads, d), queries and keys
        value = x[:, heads + key_heads :]  # (R, key heads, d)
        if hasattr(attention, "q_norm"):
            parts = _norm(attention.q_norm, x[:, :heads]), _norm(attention.k_norm, x[:, heads : heads + key_heads])
            rotated = torch.cat(parts, dim=1)
        cos, sin = rotation
        rotated = torch.addcmul(rotated * cos, rotated.roll(rotated.shape[2] // 2, dims=2), sin)
        end = self._length + 1
        size = rotated.shape[2]
        layer.keys[:, :, self._length] = rotated[:, heads:]
        layer.values[:, :, self._length] = value
        keys = layer.keys[:, :, :end].flatten(0, 1)  # (R * key heads, t, d)
        values = layer.values[:, :, :end].flatten(0, 1)  # (R * key heads, t, d)

        query = rotated[:, :heads].unflatten(1, (key_heads, -1))  # (R, key heads, queries that share a key, d)
        grouped = self._by_prompt(query)  # (P * key heads, group * queries, d)
        # Scores of the prompt's tokens, (P * key heads, group * queries, W).
        of_prompt = torch.baddbmm(self._bias, grouped, layer.prompt_keys.transpose(1, 2), alpha=attention.scaling)
        query = query.reshape(rows * key_heads, -1, size)  # (R * key heads, queries, d)
        own = torch.baddbmm(self._no_bias, query, keys.transpose(1, 2), beta=0, alpha=attention.scaling)
        own = own.view(rows, key_heads, -1, end)  # (R, key heads, queries, t)
        weights = torch.cat([self._by_row(of_prompt), own], dim=3).softmax(dim=3, dtype=torch.float32).to(x.dtype)
        of_prompt, own = weights.split([layer.prompt_keys.shape[1], end], dim=3)
        attended = self._by_row(
            torch.bmm(self._by_prompt(of_prompt), layer.prompt_values)
        )  # (R, key heads, queries, d)
        return (attended + torch.bmm(own.flatten(0, 1), values).view(attended.shape)).reshape(rows, -1)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """(R, key heads, queries, n) -> (P * key heads, group * queries, n), to read a prompt's keys once."""
        return self._groups.pad(x).transpose(1, 2).reshape(-1, self._groups.width * x.shape[2], x.shape[3])

    def _by_row(self, x: Tensor) -> Tensor:
        x = x.view(self._groups.count, self._key_heads, self._groups.width, -1, x.shape[2])
        return self._groups.unpad(x.transpose(1, 2))  # (R, key heads, queries, n)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (n,) ascending, without allocating new caches."""
        self._first_position = self._first_position[rows]
        self._prompt_of_row = self._prompt_of_row[rows]
        self._groups = rows_by_prompt(self._prompt_of_row, self._groups.count)
        for layer in self._layers:
            for x in (layer.keys, layer.values):
                x[: len(rows), :, : self._length] = x[:, :, : self._length].index_select(0, rows)
            layer.keys = layer.keys[: len(rows)]
            layer.values = layer.values[: len(rows)]


def rows_by_prompt(prompt_of_row: Tensor, prompts: int) -> VarLen:
    """The layout in which the rows of each prompt are one sequence."""
    sizes = prompt_of_row.bincount(minlength=prompts)
    return varlen(torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None])


def _layer(module: Any, kept: tuple[Tensor, Tensor], rows: int, new_tokens: int) -> Layer:
    attention = module.self_attn
    mlp = module.mlp
    prompt_keys, prompt_values = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in kept)
    keys, values = (x.new_empty(rows, x.shape[2], new_tokens, x.shape[3]) for x in kept)
    return Layer(
        module,
        FusedLinear(rows, attention.q_proj, attention.k_proj, attention.v_proj),
        FusedLinear(rows, attention.o_proj),
        FusedLinear(rows, mlp.gate_proj, mlp.up_proj),
        FusedLinear(rows, mlp.down_proj),
        prompt_keys,
        prompt_values,
        keys,
        values,
    )


def _norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm with the same rounding as in the models of the family."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    return module.weight * F.rms_norm(x.float(), module.weight.shape, None, module.variance_epsilon).to(x.dtype)
