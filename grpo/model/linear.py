"""Linear layers with oneDNN on a CPU, which multiplies float32 faster than torch's default there.

The difference is largest with weights that are reordered for oneDNN beforehand, which pays off if few tokens are
processed at a time: tests/benchmarks/NOTES.md has the measurements. All results equal those of `nn.Linear` up to
rounding.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.model.hardware import cpu_supports_bfloat16

# oneDNN prepares a product for each new number of rows, which takes half a millisecond or more, and computes it no
# faster than torch if the weight has fewer elements than this. Products of a few rows are left to it nevertheless: only
# these are rounded in another way on Intel's processors, and a run of an earlier version must continue bit for bit.
LEAST_ELEMENTS = 2**16
FEW_ROWS = 8


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` that multiplies with oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.Linear.forward`."""
        differentiable = any(each is not None and each.requires_grad for each in (x, self.weight, self.bias))
        if torch.is_grad_enabled() and differentiable:
            # As a matrix, since oneDNN's result would otherwise be a view, which a model could not change in place.
            rows = _OneDnnFunction.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
            return rows.view(*x.shape[:-1], rows.shape[-1])
        return onednn_linear(x, self.weight, self.bias)


class _OneDnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # only the weight's gradient needs x
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            onednn_linear(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            grad.t() @ x if ctx.needs_input_grad[1] else None,
            grad.sum(dim=0) if ctx.needs_input_grad[2] else None,
        )


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model multiply with oneDNN where it is available."""
    for module in model.modules():
        if type(module) is nn.Linear and has_onednn(module.weight):
            module.__class__ = OneDnnLinear  # keeps the parameters and their names


def reorder_weight(weight: Tensor, rows: int) -> Tensor:
    """A copy of the weight, reordered for `onednn_linear` with about `rows` rows at a time."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def has_onednn(tensor: Tensor) -> bool:
    """Whether this torch and this processor can multiply such tensors with oneDNN."""
    return tensor.device.type == "cpu" and tensor.dtype in _onednn_dtypes()


def is_small(weight: Tensor) -> bool:
    """Whether products of more than FEW_ROWS rows with this weight are left to torch."""
    return weight.numel() < LEAST_ELEMENTS


def is_left_to_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies x (..., inputs) and the weight, even if oneDNN could."""
    return is_small(weight) and x.numel() > FEW_ROWS * x.shape[-1]


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    # These operators are internal to torch's compiler, so a later version may not have them.
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if cpu_supports_bfloat16() else (torch.float32,)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` without gradient, with oneDNN if available; weight may then be from `reorder_weight`."""
    if is_left_to_torch(x, weight) or not has_onednn(x):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
