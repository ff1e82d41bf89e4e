"""The cost of a training step, computed before any weight is loaded: FLOPs, bytes read, and bytes allocated.

The model is built on torch's meta device, where tensors have shapes but no memory. So the tensors that the real layers
would keep can be counted for any architecture.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from grpo.config.schema import ModelConfig
from grpo.model.gated_mlp import keep_fewer_activations
from grpo.model.implementation import Implementation, set_implementation
from grpo.model.linear import onednn_linear
from grpo.model.lm_head import NARROW_CHUNKS, logits_per_chunk
from grpo.model.loading import architecture, explained
from grpo.model.logps import head_logps
from grpo.model.lora import adapted_layers, add_adapter
from grpo.model.packed import (
    UNSUPPORTED_ATTENTION,
    PackedGroups,
    VarLen,
    forward_packed,
    may_pack,
    supports_packing,
)


@dataclass(frozen=True)
class Work:
    """The prompts and completions of a step: P prompts with G completions each."""

    prompts: int  # P
    group_size: int  # G
    prompt_tokens: int  # of each prompt, on average
    lengths: list[int]  # tokens of each of the P * G completions


def meta_model(config: ModelConfig, dtype: torch.dtype, max_length: int) -> PreTrainedModel:
    """The model on the meta device, without its weights, with its adapter.

    dtype: that of the arithmetic. max_length: maximum tokens of a prompt with its completion.
    """
    remote = config.trust_remote_code
    built = architecture(config.name, remote)
    # torch's product for experts can be computed without values only in bfloat16.
    settings = {"dtype": torch.bfloat16 if num_experts(built) else dtype, "trust_remote_code": remote}
    with torch.device("meta"), explained(config):
        model = AutoModelForCausalLM.from_config(built, attn_implementation=config.attn_implementation, **settings)
        model.eval()
        keep_fewer_activations(model)
        if config.lora is not None:
            add_adapter(model, replace(config.lora, init_from=None), getattr(torch, config.dtype), seed=0)
    # That packed rows give the right numbers is checked when the weights are loaded.
    packs = may_pack(model, max_length) and _supports_packed_rows(model)
    set_implementation(model, Implementation(training="packed" if packs else "plain"))
    return model


def _supports_packed_rows(model: PreTrainedModel) -> bool:
    ids = torch.zeros(4, dtype=torch.long, device="meta")
    try:
        with _without_adapted_experts(model):
            forward_packed(model, ids, ids, _Counted(VarLen(1, 2, None), VarLen(1, 2, None)))
    except UNSUPPORTED_ATTENTION:
        return False
    return True


def parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of frozen parameters; tied parameters count once."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in model.parameters()) - trained


def products(model: PreTrainedModel) -> tuple[int, int]:
    """The numbers of parameters of the body and of the output head that each token is multiplied with.

    Of a mixture of experts these are only the experts that a token is sent to.
    """
    head = model.get_output_embeddings().weight
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not head and p not in tables]
    config = _text_config(model)
    experts = num_experts(config)
    chosen = getattr(config, "num_experts_per_tok", None) or experts
    of_experts = sum(p.numel() for p in matrices if p.dim() == 3 and len(p) == experts)
    others = sum(p.numel() for p in matrices) - of_experts
    return others + (of_experts * chosen // experts if experts else 0), head.numel()


def num_experts(config: PretrainedConfig) -> int:
    """The number of experts in a layer of a mixture of experts; 0 for other models."""
    text = config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((count for name in names if (count := getattr(text, name, None))), 0)


def _text_config(model: PreTrainedModel) -> PretrainedConfig:
    return model.config.get_text_config(decoder=True)


def forward_flops(model: PreTrainedModel, work: Work) -> float:
    """FLOPs of the matrix products of one forward pass over all tokens of a step; each prompt is processed once."""
    (body, head) = products(model)
    config = _text_config(model)
    inputs = work.prompts * work.prompt_tokens + sum(work.lengths) - len(work.lengths)
    width = _head_size(config) * _heads(config) * config.num_hidden_layers
    attended = work.prompts * work.prompt_tokens**2 / 2 + sum(n * (work.prompt_tokens + n / 2) for n in work.lengths)
    return 2 * body * inputs + 2 * head * sum(work.lengths) + 4 * width * attended


def step_flops(model: PreTrainedModel, work: Work, reference: bool, updates: int) -> float:
    """FLOPs of the matrix products of a step: sampling, the reference pass if there is one, and the updates."""
    frozen = parameters(model)[1] > 0  # no gradient is computed for the frozen weights
    return forward_flops(model, work) * (1 + reference + (2 if frozen else 3) * updates)


def decode_bytes(model: PreTrainedModel, work: Work, itemsize: int) -> float:
    """Bytes of weights read while decoding: all weights once per token of the longest completion."""
    return max(work.lengths) * sum(products(model)) * itemsize


def cache_bytes(model: PreTrainedModel, tokens: float, itemsize: int) -> float:
    """Bytes of the key-value cache of `tokens` tokens."""
    config = _text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or _heads(config)
    return 2 * config.num_hidden_layers * heads * _head_size(config) * tokens * itemsize


def activation_bytes(
    model: PreTrainedModel, prompts: int, prompt_tokens: int, rows: int, tokens: int, itemsize: int
) -> float:
    """Bytes of the activations that are kept for the backward pass of one micro-batch.

    The micro-batch has `rows` completions of `tokens` tokens and `prompts` prompts of `prompt_tokens` tokens.
    model: from `meta_model`. itemsize: bytes of a number in the dtype of the arithmetic.
    """
    held: dict[int, Tensor] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held[storage._cdata] = tensor
        return tensor

    meta = torch.device("meta")
    inputs = prompts * prompt_tokens + rows * (tokens - 1)
    ids = torch.zeros(inputs, dtype=torch.long, device=meta)
    packing = _Counted(VarLen(prompts, prompt_tokens, None), VarLen(rows, tokens - 1, None))
    active = torch.zeros(rows * tokens, dtype=torch.long, device=meta)
    with _without_adapted_experts(model), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if supports_packing(model):
            hidden = forward_packed(model, ids, ids, packing)
        else:
            width = prompt_tokens + tokens
            padded = torch.zeros(rows, width, dtype=torch.long, device=meta)
            # The mask is passed, since computing one needs the values of tensors, which do not exist on this device.
            mask = torch.zeros(rows, 1, width, width, dtype=model.dtype, device=meta)
            hidden = model.get_decoder()(input_ids=padded, attention_mask=mask, use_cache=False)[0].flatten(0, 1)
        hidden = hidden.index_select(0, active)
        logps, _ = head_logps(model.get_output_embeddings(), hidden, active, 0.9)
    assert logps.requires_grad  # otherwise no tensors would have been kept
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) * itemsize / model.dtype.itemsize


@contextmanager
def _without_adapted_experts(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the adapters of experts, which peft cannot compute on the meta device; their activations are small."""
    adapters = [layer for layer in adapted_layers(model) if hasattr(layer, "parameter_name")]
    trained = [p for layer in adapters for p in layer.parameters() if p.requires_grad]
    for layer in adapters:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapters:
            layer.enable_adapters(True)
        for parameter in trained:
            parameter.requires_grad_(True)


def head_bytes(model: PreTrainedModel, device: str) -> int:
    """Bytes that the output head allocates temporarily: three buffers of a chunk of logits, and its weight gradient.

    device: its type, on which the size of a chunk depends.
    If its weights are tied to the embedding, the gradients of both exist before they are added. In dtypes narrower than
    float32 the gradient is accumulated in float32, from products that each take a few chunks together.
    """
    weight = model.get_output_embeddings().weight
    gradients = 0 if not weight.requires_grad else 2 if weight is model.get_input_embeddings().weight else 1
    chunk = max(logits_per_chunk(device), len(weight))
    per_weight = gradients * weight.itemsize
    per_logit = 3 * 4
    if weight.itemsize < 4:
        per_logit += 2 * NARROW_CHUNKS * weight.itemsize
        per_weight = max(per_weight, 4 + weight.itemsize) if gradients else 0
    return chunk * per_logit + weight.numel() * per_weight


class _Counted(PackedGroups):
    """Replaces attention when only the tensors that it keeps for the backward pass are counted."""

    def __init__(self, prompts: VarLen, completions: VarLen) -> None:
        rows = torch.zeros(completions.count, dtype=torch.long, device="meta")
        super().__init__(prompts, completions, rows, torch.zeros(0, device="meta"))

    def attention(self, *tensors: Any) -> Tensor:
        return _Kept.apply(*tensors[:3])


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        normalizers = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizers)
        return output


def machine_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Measured rates of this machine: FLOP/s of a large matrix product, and bytes/s of reading memory."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    big = torch.zeros(2**28 if cuda else 2**27, device=device)

    def best(work: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(8):
            started = time.perf_counter()
            work()[:1].tolist()  # waits until the work is done
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    product = min(best(lambda: (a @ b)[0]), best(lambda: onednn_linear(a, b)[0]))
    return 2 * size**3 / product, big.numel() * 4 / best(lambda: big.sum()[None])


def _heads(config: PretrainedConfig) -> int:
    """The number of attention heads; 0 for recurrent models, which have none."""
    return getattr(config, "num_attention_heads", None) or 0


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // max(1, _heads(config))
