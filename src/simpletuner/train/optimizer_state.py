"""Convert an optimizer's state to named tensors and JSON, and back, without changing dtypes, devices or bits.

`Optimizer.load_state_dict` is not used: it casts floating-point tensors to the parameter's dtype, which would widen
bf16 moments and the state of 8-bit optimizers.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

PAGED_ENTRIES = ("state1", "state2")
"""Moments of bitsandbytes optimizers, which a paged optimizer stores in memory that moves between GPU and host."""


@runtime_checkable
class PagedOptimizer(Protocol):
    """A bitsandbytes optimizer, paged or not."""

    is_paged: bool

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros with the shape and device of `p`, in paged memory if the optimizer is paged and `p` is large and on a
        GPU.
        """
        ...


def pack(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors, named "<entry>/<parameter>", and JSON for everything else: per
    parameter, common to all, and per group.

    Raises:
        TypeError: the state contains a value that is neither a tensor nor JSON.
    """
    tensors: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[str, Any] = {}
    common: dict[str, Any] = {}
    # Torch declares tensors as keys, but some libraries also use strings.
    optimizer_states: Mapping[Any, Any] = optimizer.state
    for key, values in optimizer_states.items():
        if isinstance(key, str):  # state that belongs to no parameter
            common[key] = _packed(values, f"{key}/common", torch.device("cpu"), tensors)
            continue
        name = names[id(key)]
        state[name] = {entry: _packed(value, f"{entry}/{name}", key.device, tensors) for entry, value in values.items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        device = group["params"][0].device
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({key: _packed(value, f"{key}/group.{index}", device, tensors) for key, value in settings.items()})
    return tensors, {"state": state, "common": common, "groups": groups}


def unpack(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Load the state that `pack` returned for an equal optimizer into a freshly built `optimizer`. A paged optimizer
    pages the moments that it would have paged itself, no matter on which device they were saved.

    Args:
        scalars: the JSON values that `pack` returned.

    Raises:
        KeyError, ValueError: the state belongs to another optimizer or to other parameters.
    """
    if len(scalars["groups"]) != len(optimizer.param_groups):
        raise ValueError(f"{len(scalars['groups'])} saved parameter groups, not {len(optimizer.param_groups)}")
    for name, values in scalars["state"].items():
        parameter = parameters[name]
        state = {entry: _unpacked(value, parameter.device, tensors) for entry, value in values.items()}
        if isinstance(optimizer, PagedOptimizer) and optimizer.is_paged:
            state |= {entry: _paged(optimizer, parameter, state[entry]) for entry in PAGED_ENTRIES if entry in state}
        optimizer.state[parameter] = state
    optimizer_states: dict[Any, Any] = optimizer.state
    for key, value in scalars["common"].items():
        optimizer_states[key] = _unpacked(value, torch.device("cpu"), tensors)
    for group, saved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        missing = group.keys() - saved.keys() - {"params"}  # some optimizers add to a group at their first step
        if missing:
            raise ValueError(f"the saved optimizer lacks the settings {', '.join(sorted(missing))}")
        device = group["params"][0].device
        group.update({key: _unpacked(value, device, tensors) for key, value in saved.items()})


def _paged(optimizer: PagedOptimizer, parameter: nn.Parameter, moment: Tensor) -> Tensor:
    """`moment`, copied into a buffer that the optimizer allocates."""
    # A view of the moment's shape, which may be larger than the parameter's, without allocating memory.
    like = parameter.detach().flatten()[:1].expand(moment.shape)
    return optimizer.get_state_buffer(like, dtype=moment.dtype).copy_(moment)


_PLAIN = (str, bool, int, type(None))


def _packed(value: Any, name: str, device: torch.device, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON. A type that JSON lacks becomes an object whose first key names the type."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name, "device": "parameter" if value.device == device else "cpu"}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple):
        items = [_packed(item, _inside(name, index), device, tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [[key, _packed(item, _inside(name, key), device, tensors)] for key, item in value.items()]
        if all(isinstance(key, str | int | float) for key in value):
            return {"dict": pairs}
    raise TypeError(f"{name} is a {type(value).__name__}")


def _inside(name: str, key: object) -> str:
    """The name of the item `key` in `name`: item 0 of "GG/layer.a" is "GG.0/layer.a"."""
    entry, _, owner = name.partition("/")
    return f"{entry}.{key}/{owner}"


def _unpacked(value: Any, device: torch.device, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, device, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        # Copy it: tensors that several parameters share may be one tensor in the file.
        return tensors[value["tensor"]].to(device if value["device"] == "parameter" else "cpu", copy=True)
    if "float" in value:
        return float(value["float"])
    if "dtype" in value:
        return {str(known).removeprefix("torch."): known for known in _dtypes()}[value["dtype"]]
    if "tuple" in value:
        return tuple(_unpacked(item, device, tensors) for item in value["tuple"])
    return {key: _unpacked(item, device, tensors) for key, item in value["dict"]}


def _dtypes() -> Iterator[torch.dtype]:
    yield from (value for value in vars(torch).values() if isinstance(value, torch.dtype))
