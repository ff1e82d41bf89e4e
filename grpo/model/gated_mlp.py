"""The gated MLP of the Llama family with fewer activations kept for the backward pass.

transformers' code keeps the gate, its SiLU, the other half and the product of both, four numbers per inner feature and
token, which is half of all activations. Here only the gate and the other half are kept; the rest is computed again.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from grpo.model.implementation import LLAMA_FAMILY, module_of_family
from grpo.model.linear import OneDnnLinear, onednn_linear

ENDING = "MLP"  # of the names of these classes; they compute down(silu(gate(x)) * up(x))


def keep_fewer_activations(model: nn.Module) -> None:
    """Make the MLPs of a model of the family keep fewer activations.

    The results are the same bits if linear layers multiply as `grpo.model.linear.onednn_linear` does.
    """
    kinds = {f"{module_of_family(name)}.{name}{ENDING}": name for name in LLAMA_FAMILY}
    module: Any
    for module in model.modules():
        name = kinds.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if name is not None and module.config.hidden_act == "silu":
            module.__class__ = _with_fewer_activations(name)  # keeps the parameters and their names


def __getattr__(attribute: str) -> Any:
    """The classes that replace those of transformers, by the same names: pickle looks for them here."""
    name = attribute.removesuffix(ENDING)
    if name == attribute or name not in LLAMA_FAMILY:
        raise AttributeError(f"module {__name__} has no attribute {attribute}")
    return _with_fewer_activations(name)


@functools.cache  # one class for all layers
def _with_fewer_activations(name: str) -> Any:
    kind: Any = getattr(importlib.import_module(module_of_family(name)), name + ENDING)

    def forward(self: Any, x: Tensor) -> Tensor:
        down = self.down_proj
        plain = type(down) in (nn.Linear, OneDnnLinear) and down.bias is None  # an adapter needs the product, too
        if not (plain and torch.is_grad_enabled()):
            return kind.forward(self, x)
        gate, up = (layer(x) for layer in (self.gate_proj, self.up_proj))
        rows = _GatedProduct.apply(gate.flatten(0, -2), up.flatten(0, -2), down.weight)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


class _GatedProduct(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T` of gate and up (rows, inner) and weight (outputs, inner)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return onednn_linear(F.silu(gate) * up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = grad.t() @ (activated * up) if ctx.needs_input_grad[2] else None
        grad_product = onednn_linear(grad, weight.t())
        grad_up = grad_product * activated
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_gate, grad_up, grad_weight
