"""Linear layers on a CPU by oneDNN, which multiplies float32 faster than torch's default there.

With the weights laid out for it beforehand, which pays where one reading of them serves few tokens, the difference is
largest: tests/benchmarks/NOTES.md has the measurements. Everything here computes what `nn.Linear` does, to rounding.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.model.hardware import cpu_multiplies_bfloat16


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` that multiplies with oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear.forward`."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _OneDnnFunction.apply(x, self.weight, self.bias)
        return onednn_linear(x, self.weight, self.bias)


class _OneDnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # frozen weights need no input again
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            onednn_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def use_onednn(model: nn.Module) -> None:
    """Let every linear layer of a model multiply with oneDNN, where it can."""
    for module in model.modules():
        if type(module) is nn.Linear and has_onednn(module.weight):
            module.__class__ = OneDnnLinear  # the same parameters under the same names


def reorder_weight(weight: Tensor, rows: int) -> Tensor:
    """Weights laid out for `onednn_linear` with about `rows` rows at a time. Takes the memory of another copy."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def has_onednn(tensor: Tensor) -> bool:
    """Whether this torch and this processor have the products of oneDNN for such tensors."""
    return tensor.device.type == "cpu" and tensor.dtype in _onednn_dtypes()


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    # Made for torch's compiler, so not promised to stay.
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if cpu_multiplies_bfloat16() else (torch.float32,)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` without gradient, by oneDNN where it is; weight may then be one of `reorder_weight`."""
    if not has_onednn(x):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
