"""Log-probabilities from hidden states, computed from the logits of a few tokens at a time."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from grpo.model.implementation import implementation_of
from grpo.model.linear import onednn_linear

LOGITS_PER_CHUNK = 2**23  # 32 MB of float32: about the size of a processor's cache, since a chunk is read many times
# On a card a chunk of 55 tokens, as these are with the vocabulary of Qwen2.5, takes a fraction of the time to compute
# that it takes to read the head, 466 MB; with 220 tokens both take about as long. Not measured yet.
LOGITS_PER_CHUNK_ON_CUDA = 2**25
Entropy = Literal["none", "value", "gradient"]  # not computed, without gradient, or with gradient
NARROW_CHUNKS = 4  # per product with 16-bit weights, where each product also reads and writes a float32 gradient sum


class HeadLogps(torch.autograd.Function):
    """`log_softmax(hidden @ weight.T / temperature)` at the targets, and on request its entropy.

    hidden (A, H), weight (V, H), targets (A,) -> logps (A,) and entropy (A,), float32. The backward pass computes the
    logits again in chunks, so that all (A, V) of them never exist at once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: Entropy
    ) -> tuple[Tensor, Tensor]:
        """See the class."""
        logps, entropies, normalizers = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(hidden), weight):
            logits = _logits(hidden[part], weight, temperature)  # (chunk, V)
            normalizers[part] = logits.logsumexp(dim=1)
            logits -= normalizers[part, None]
            logps[part] = logits.gather(1, targets[part, None])[:, 0]
            if entropy != "none":
                entropies[part] = -torch.linalg.vecdot(logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.temperature = temperature
        ctx.entropy_has_gradient = entropy == "gradient"
        if entropy != "gradient":
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden and weight, given those of the log-probabilities and of the entropies, (A,)."""
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        narrow = weight.itemsize < 4
        summed = torch.float32 if narrow else weight.dtype
        grad_weight: Tensor | None = None
        grad = grad / ctx.temperature
        grad_entropy = grad_entropy / ctx.temperature
        for block in _chunks(len(hidden), weight, NARROW_CHUNKS if narrow else 1):
            of_block = [each[block] for each in (hidden, targets, normalizers, entropies, grad, grad_entropy)]
            grad_logits = _grad_logits(ctx, weight, *of_block)
            grad_hidden[block] = onednn_linear(grad_logits, weight.t())
            if not ctx.needs_input_grad[1]:
                continue
            if grad_weight is None:
                grad_weight = (grad_logits.t() @ hidden[block]).to(summed)
            elif narrow:  # summed in float32: in 16 bits much of what a block adds would be rounded away
                grad_weight += grad_logits.t() @ hidden[block]
            else:
                grad_weight.addmm_(grad_logits.t(), hidden[block])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _grad_logits(
    ctx: Any,
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    entropies: Tensor,
    grad: Tensor,
    grad_entropy: Tensor,
) -> Tensor:
    """The gradient (a, V) of some tokens' logits before the division by the temperature, in the weights' dtype.

    That of a log-probability is 1 at its target, minus the probabilities p; that of an entropy is -p (log p + entropy).
    """
    parts = []
    for part in _chunks(len(hidden), weight):
        logits = _logits(hidden[part], weight, ctx.temperature)  # (chunk, V)
        logits.sub_(normalizers[part, None])
        if ctx.entropy_has_gradient:
            probabilities = logits.exp()
            logits.add_(entropies[part, None]).mul_(-grad_entropy[part, None]).sub_(grad[part, None])
            logits.mul_(probabilities)
        else:
            logits.exp_().mul_(-grad[part, None])
        logits.scatter_add_(1, targets[part, None], grad[part, None])
        parts.append(logits.to(hidden.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def logits_per_chunk(device: str) -> int:
    """The number of logits that are computed at a time. device: its type."""
    return LOGITS_PER_CHUNK_ON_CUDA if device == "cuda" else LOGITS_PER_CHUNK


def _chunks(tokens: int, weight: Tensor, times: int = 1) -> list[slice]:
    size = max(1, logits_per_chunk(weight.device.type) // len(weight)) * times
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = onednn_linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from hidden states (..., H) to the model's logits (..., V)."""
    head = model.get_output_embeddings()
    chosen = implementation_of(model)
    if chosen.logit_cap is not None:
        cap = chosen.logit_cap
        return lambda hidden: soft_cap(head(hidden), cap)
    return head if chosen.logit_scale == 1.0 else lambda hidden: head(hidden) * chosen.logit_scale


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Limit logits smoothly to the range from -cap to cap. Source: Gemma 2 (arXiv 2408.00118), section 2."""
    return cap * torch.tanh(logits / cap)
