"""Fast sampling on a processor with the C functions in the folder c: all layers of a token in one call.

`FastDecoder` and `sample_tokens` in `grpo/rollout/native.py` are the plain forms, whose numbers differ by rounding.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo.batch import Prompts
from grpo.c_library import load_library
from grpo.model.lora import low_rank
from grpo.rollout.engine import Sampling
from grpo.rollout.llama_decoder import read_prompts, supports_fast_decoding

LANES = 16  # the largest one in vectors.h; also PANEL in decode.c
SMALL = 2**16  # a weight with fewer elements is stored in another order, see `small_products`


class _Linear(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("weight", "bias", "down", "up")),
        *((name, c_int64) for name in ("outputs", "inputs", "rank", "small")),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "middle_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("prompt_keys", "prompt_values", "keys", "values")),
    ]


class _Model(Structure):
    _fields_ = [
        ("layers", POINTER(_Layer)),
        ("head", _Linear),
        ("norm", c_void_p),
        *((name, c_int64) for name in ("layer_count", "hidden", "inner", "heads", "key_heads", "size")),
        *((name, c_int64) for name in ("prompt_width", "most_tokens")),
        *((name, c_float) for name in ("epsilon", "scale")),
        *((name, c_int32) for name in ("narrow", "threads")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("slot", "prompt", "prompt_length", "cosine", "sine", "x", "normed", "heads")),
        *((name, c_void_p) for name in ("attended", "gate", "up", "low_rank", "scores", "logits")),
        *((name, c_int64) for name in ("rows", "most_rank", "position")),
    ]


class _Sample(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("logits", "keys", "stops", "tokens", "logps")),
        *((name, c_int64) for name in ("rows", "vocabulary", "stop_count")),
        ("temperature", c_float),
        *((name, c_int32) for name in ("no_stops", "threads")),
    ]


def supports_compiled_decoding(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether `CompiledDecoder` supports the model's architecture, with weights in this dtype on a CPU."""
    if dtype not in (torch.float32, torch.bfloat16) or not supports_fast_decoding(model):
        return False
    config = model.get_decoder().config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    multiplied = (size, config.hidden_size, config.intermediate_size, config.num_attention_heads * size)
    return not any(number % LANES for number in multiplied)


def sample_tokens(
    logits: Tensor, noise_keys: Tensor, t: int, sampling: Sampling, stop_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """See `sample_tokens` in `grpo/rollout/native.py`."""
    logits = logits.contiguous()
    noise_keys = noise_keys.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.long)
    logps = torch.empty(len(logits))
    addresses = (each.data_ptr() for each in (logits, noise_keys, stop_ids, tokens, logps))
    no_stops = t < sampling.min_new_tokens
    numbers = (*logits.shape, len(stop_ids), sampling.temperature, no_stops, torch.get_num_threads())
    load_library().sample(ctypes.byref(_Sample(*addresses, *numbers)))
    return tokens, logps


class CompiledDecoder:
    """Decodes R rows, which are ordered by prompt; `logits` (R, V) float32 are those of the next token."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_of_row: Tensor, max_tokens: int) -> None:
        hidden, packing = read_prompts(model, prompts)
        lengths = prompts.mask.sum(dim=1)  # (P,)
        rows = len(prompt_of_row)
        self._decode = load_library().decode
        self._decoder = model.get_decoder()
        self._held: list[Tensor] = []  # tensors whose addresses are in the structures
        self._prompt_of_row = prompt_of_row
        self._first_position = lengths[prompt_of_row]
        self._slots = torch.arange(rows)
        self._most_rank = LANES
        self._step = _Step(position=0)
        config = self._decoder.config
        size = packing.kept[0][0].shape[3]
        layers = [
            self._layer(module, packing.kept[number], rows, max_tokens)
            for number, module in enumerate(self._decoder.layers)
        ]
        head = model.get_output_embeddings()
        self._model = _Model(
            layers=(_Layer * len(layers))(*layers),
            head=self._linear(head),
            norm=self._float(self._decoder.norm.weight),
            layer_count=len(layers),
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            size=size,
            prompt_width=packing.prompts.width,
            most_tokens=max_tokens,
            epsilon=self._decoder.norm.variance_epsilon,
            scale=self._decoder.layers[0].self_attn.scaling,
            narrow=head.weight.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
        )
        self._allocate(rows)
        self.logits = head(hidden).float()[prompt_of_row]

    def read(self, tokens: Tensor) -> None:
        """Process one more token of each row, (R,), and update `logits`."""
        # In the dtype of the model, in which transformers rounds the angles of positions, too.
        x = self._decoder.embed_tokens(tokens)  # (R, H)
        step = self._step
        assert step.position < self._model.most_tokens
        positions = self._first_position + step.position
        cosine, sine = (a[0].float().contiguous() for a in self._decoder.rotary_emb(x, positions[None]))  # (R, d)
        x = x.float().contiguous()
        self.logits = x.new_empty(len(x), self._model.head.outputs)
        step.x, step.cosine, step.sine, step.logits = (a.data_ptr() for a in (x, cosine, sine, self.logits))
        step.rows = len(x)
        self._decode(ctypes.byref(self._model), ctypes.byref(step))
        step.position += 1

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, (n,) ascending."""
        self._first_position = self._first_position[rows]
        self._prompt_of_row = self._prompt_of_row[rows]
        self._slots = self._slots[rows]
        self._set_rows()

    def _set_rows(self) -> None:
        step = self._step
        step.slot, step.prompt, step.prompt_length = (
            a.data_ptr() for a in (self._slots, self._prompt_of_row, self._first_position)
        )

    def _allocate(self, rows: int) -> None:
        """Allocate the working memory."""
        model = self._model
        width = -(-(model.prompt_width + model.most_tokens) // LANES) * LANES  # `score_width` in decode.c
        sizes = {
            "normed": rows * model.hidden,
            "heads": rows * (model.heads + 2 * model.key_heads) * model.size,
            "attended": rows * model.heads * model.size,
            "gate": rows * model.inner,
            "up": rows * model.inner,
            "low_rank": 3 * rows * self._most_rank,
            "scores": model.threads * model.heads // model.key_heads * width,
        }
        for name, size in sizes.items():
            setattr(self._step, name, self._address(torch.empty(size)))
        self._step.most_rank = self._most_rank
        self._set_rows()

    def _layer(self, module: Any, kept: tuple[Tensor, Tensor], rows: int, max_tokens: int) -> _Layer:
        attention = module.self_attn
        mlp = module.mlp
        keys, values = (x.transpose(1, 2).float().contiguous() for x in kept)  # (P, key heads, W, d)
        own = (rows, keys.shape[1], max_tokens, keys.shape[3])
        normed = hasattr(attention, "q_norm")
        return _Layer(
            query=self._linear(attention.q_proj),
            key=self._linear(attention.k_proj),
            value=self._linear(attention.v_proj),
            output=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            input_norm=self._float(module.input_layernorm.weight),
            middle_norm=self._float(module.post_attention_layernorm.weight),
            query_norm=self._float(attention.q_norm.weight) if normed else None,
            key_norm=self._float(attention.k_norm.weight) if normed else None,
            prompt_keys=self._address(keys),
            prompt_values=self._address(values),
            keys=self._address(keys.new_empty(own)),
            values=self._address(keys.new_empty(own)),
        )

    def _linear(self, layer: Any) -> _Linear:
        base = getattr(layer, "base_layer", layer)
        outputs, inputs = base.weight.shape
        small = outputs * inputs < SMALL and outputs % LANES == 0
        weight = base.weight.float().view(-1, LANES, inputs).transpose(1, 2) if small else base.weight
        linear = _Linear(
            weight=self._address(weight),
            bias=None if base.bias is None else self._float(base.bias),
            outputs=outputs,
            inputs=inputs,
            small=small,
        )
        if factors := low_rank(layer):
            down, up = factors
            padding = -len(down) % LANES  # columns that are multiplied are multiples of LANES
            linear.down = self._float(nn.functional.pad(down, (0, 0, 0, padding)))
            linear.up = self._float(nn.functional.pad(up, (0, padding)))
            linear.rank = len(down) + padding
            self._most_rank = max(self._most_rank, linear.rank)
        return linear

    def _float(self, x: Tensor) -> int:
        return self._address(x.detach().float())

    def _address(self, x: Tensor) -> int:
        x = x.detach().contiguous()
        self._held.append(x)
        return x.data_ptr()
