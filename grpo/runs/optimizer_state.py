"""The state of an optimizer as tensors: what a checkpoint stores, whether it fits, and loading it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.errors import FileError
from grpo.runs.checkpoint import source_of


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<parameter number>.<name>` and `group.<group number>.<name>`.

    Settings are not included; they come from the config. A plain number becomes a tensor of int64 or float64.
    """
    entries = {
        f"{number}.{key}": _as_tensor(value)
        for number, (parameter, _) in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    entries |= _group_state(optimizer)
    seen: set[int] = set()
    for key, value in entries.items():  # safetensors allows one name per tensor, so copy shared ones
        if value.data_ptr() in seen:
            entries[key] = value.clone()
        seen.add(value.data_ptr())
    return entries


def _group_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state that an optimizer keeps in its groups in addition to its settings, such as d and k of Prodigy."""
    constructors = [each.__init__ for each in type(optimizer).__mro__]  # type: ignore[misc]  # of classes, not instances
    settings = {name for each in constructors for name in inspect.signature(each).parameters}
    return {
        f"group.{number}.{name}": _as_tensor(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if isinstance(value, int | float) and name not in settings and value != optimizer.defaults.get(name)
    }


def _as_tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value).contiguous()


@torch.no_grad()
def check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, may_be_empty: bool = False) -> None:
    """Raise FileError if the optimizer state of a checkpoint does not fit this optimizer and its parameters.

    saved: as returned by `read_checkpoint`. optimizer: a new one of the same kind, over the same parameters, to be
    discarded afterwards. It takes one step with a gradient of ones to create its state. This changes the weights, so
    the weights of the checkpoint must be loaded afterwards. may_be_empty: accept a checkpoint without a state, from
    which an optimizer starts anew.
    """
    for parameter, _ in _parameters(optimizer):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    expected = {key: _kind(value) for key, value in flatten_optimizer(optimizer).items() if key[0].isdigit()}

    found = {key: _kind(value) for key, value in saved["optimizer"].items()}
    stateful = {key.partition(".")[0] for key in found}  # a parameter without a gradient so far has no state
    wrong = [key for key, kind in expected.items() if key.partition(".")[0] in stateful and found.get(key) != kind]
    wrong += [key for key in found if not _is_place(key, optimizer)]
    state = saved["trainer"]
    no_update_so_far = may_be_empty or state.skipped_in_a_row == state.step  # no loss or gradient was finite
    if wrong or (expected and not stateful and not no_update_so_far):
        which = f"entry {wrong[0]} is missing, or of another shape or type" if wrong else "it is empty"
        raise FileError(
            f"{source_of(saved['optimizer'])} is not the state of this optimizer and model: {which}; use another "
            "checkpoint"
        )


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and the type of a tensor: another one fails in the optimizer, or crashes the process."""
    return tuple(tensor.shape), tensor.dtype


def _is_place(key: str, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an entry's name refers to an existing parameter, or to an existing number in a parameter group."""
    parts = key.split(".", 2)
    if parts[0] == "group" and len(parts) == 3 and parts[1].isdecimal():
        groups = optimizer.param_groups
        return int(parts[1]) < len(groups) and isinstance(groups[int(parts[1])].get(parts[2]), int | float)
    return len(parts) > 1 and parts[0].isdecimal() and int(parts[0]) < len(_parameters(optimizer))


def load_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Load the state that `flatten_optimizer` returned. The optimizer must have its parameters in the same order."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if number == "group":
            number, name = name.split(".", 1)
            optimizer.param_groups[int(number)][name] = value.item()
            continue
        parameter, group = parameters[int(number)]
        # Not with `load_state_dict`, which would cast it to the parameter's dtype and hold it in memory twice.
        on_device = name != "step" or group.get("fused") or group.get("capturable")  # these need even the step there
        value = value.to(parameter.device if on_device else value.device, copy=True)
        is_plain = value.dim() == 0 and value.dtype in (torch.int64, torch.float64)  # was a plain number
        optimizer.state[parameter][name] = value.item() if is_plain else value


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """Every parameter with its group, in the order by which they are numbered."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
