"""Optimizers that torch lacks: AdamW for bfloat16 weights, and Muon with AdamW for the parameters it cannot take."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from grpo.counter_rng import random_bits

CHUNK = 2**22  # values updated at a time: about ten temporary float32 copies of them are allocated
NOT_FOR_MUON = ("embed", "lm_head", "wte", "wpe")  # parts of the names of embeddings and output heads


def exempt_vectors(optimizer: torch.optim.Optimizer) -> None:
    """Set the weight decay of vectors, such as biases and the weights of norms, to 0, as is usual.

    Groups with weight decay are split, in place, and the order of the parameters is kept, since checkpoints number the
    states by it. Optimizers of other packages are left as they are: some compute a step size for each group.
    """
    if not type(optimizer).__module__.startswith(("torch.optim.", __name__)):
        return
    groups = []
    for group in optimizer.param_groups:
        is_vector = [parameter.dim() < 2 for parameter in group["params"]]
        decay = group.get("weight_decay") or 0.0
        if decay and all(is_vector):
            group["weight_decay"] = 0.0
        if decay == 0 or len(set(is_vector)) == 1:  # the same object, which an optimizer inside this one may share
            groups.append(group)
            continue
        for vectors, run in groupby(range(len(is_vector)), key=is_vector.__getitem__):
            places = list(run)
            parts = {name: [group[name][i] for i in places] for name in ("params", "param_names") if name in group}
            groups.append(group | parts | {"weight_decay": 0.0 if vectors else decay})
    optimizer.param_groups[:] = groups


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with weights and states in bfloat16: 6 bytes per parameter.

    A step is computed in float32 and rounded up or down at random such that its expected value is kept (stochastic
    rounding, as in Zamirai et al., arXiv 2010.06192): with rounding to nearest, a step of less than 0.2 % of a weight
    would always be lost. The random bits are a function of (seed, step, parameter, element), so that a resumed run
    rounds in the same way. Parameters of another dtype have states in that dtype and are not rounded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """One update of every parameter that has a gradient."""
        groups = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(groups):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            step = int(state["step"])
            flat = [x.view(-1) for x in (parameter.data, state["exp_avg"], state["exp_avg_sq"])]
            grad = parameter.grad.reshape(-1)
            for start in range(0, len(grad), CHUNK):
                parts = [x[start : start + CHUNK] for x in (*flat, grad)]
                bits = None
                if parameter.dtype == torch.bfloat16:
                    bits = [
                        random_bits(counters, start, len(parts[0]), parameter.device)
                        for counters in ((self._seed, step, number), (self._seed, step, number, 1))
                    ]
                _adamw(group, step, *parts, bits=bits)


def _adamw(
    group: dict[str, Any],
    step: int,
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    grad: Tensor,
    *,
    bits: list[Tensor] | None,
) -> None:
    """Update weights (n,) and states in place. bits: two of (n,) int32, for stochastic rounding; None: no rounding."""
    beta1, beta2 = group["betas"]
    grad = grad.float()
    new_mean = mean.float().lerp_(grad, 1 - beta1)
    new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    scale = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    new.addcdiv_(new_mean, scale, value=-group["lr"] / (1 - beta1**step))
    if bits is not None:  # rounded to the nearest, the averages too would stop short of a constant gradient
        new = round_stochastically(new, bits[0])
        new_square = round_stochastically(new_square, bits[0] >> 16)
        new_mean = round_stochastically(new_mean, bits[1])
    weight.copy_(new)
    mean.copy_(new_mean)
    square.copy_(new_square)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 values, in place, to one of the two nearest bfloat16 numbers, keeping the expected value.

    bits: random int32 of the same shape, of which the lower 16 bits are used.
    """
    x.view(torch.int32).add_(bits & 0xFFFF).bitwise_and_(-0x10000)
    return x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices within the layers, AdamW for embeddings, the head, norms and biases.

    params: pairs of name and parameter. Muon's updates are scaled to the size of AdamW's (Liu et al., arXiv
    2502.16982), so that both can use the same learning rate.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, torch.nn.Parameter]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        matrices: list[tuple[str, torch.nn.Parameter]] = []
        rest: list[tuple[str, torch.nn.Parameter]] = []
        for name, parameter in params:
            embeds = any(part in name for part in NOT_FOR_MUON)
            (matrices if parameter.dim() == 2 and not embeds else rest).append((name, parameter))
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
                )
            )
        if rest:
            # In the same order, but in groups without or with only vectors, for `exempt_vectors`.
            runs = [{"params": list(run)} for _, run in groupby(rest, key=lambda pair: pair[1].dim() < 2)]
            self._parts.append(
                torch.optim.AdamW(runs, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)
            )
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.defaults = {name: value for part in self._parts for name, value in part.defaults.items()}
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """One update of every parameter that has a gradient."""
        for part in self._parts:
            part.step()
