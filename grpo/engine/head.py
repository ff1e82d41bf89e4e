"""From hidden states to log-probabilities, a few tokens' logits at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.engine.linear import multiply

LOGITS_PER_CHUNK = 2**23  # 32 MB of float32: about what the cache of a processor holds, since many passes go over it


class HeadLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets, and its entropy where asked for, without gradient.

    hidden (A, H), weight (V, H), targets (A,) -> logps (A,) and entropy (A,), float32. The backward pass computes the
    logits again, so that never more than a chunk of them exists.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        logps, entropy, normalizers = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(3))
        for part in _chunks(len(hidden), weight):
            logits = _logits(hidden[part], weight, temperature)
            normalizers[part] = logits.logsumexp(dim=1)
            logits -= normalizers[part, None]
            logps[part] = logits.gather(1, targets[part, None])[:, 0]
            if with_entropy:
                entropy[part] = -torch.linalg.vecdot(logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = grad / ctx.temperature
        for part in _chunks(len(hidden), weight):
            logits = _logits(hidden[part], weight, ctx.temperature)
            logits.sub_(normalizers[part, None]).exp_().mul_(-grad[part, None])
            logits.scatter_add_(1, targets[part, None], grad[part, None])
            logits = logits.to(hidden.dtype)
            grad_hidden[part] = multiply(logits, weight.t())
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), hidden[part])
        return grad_hidden, grad_weight, None, None, None


def _chunks(tokens: int, weight: Tensor) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = multiply(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
