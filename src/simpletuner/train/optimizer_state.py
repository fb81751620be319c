"""An optimizer's whole state as named tensors and JSON, and back, without a change of type, device or bit.

`Optimizer.load_state_dict` is not used: it casts floating tensors to the parameter's type, and so would widen bf16
moments and what 8-bit optimizers keep.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

PAGED_ENTRIES = ("state1", "state2")
"""Moments of bitsandbytes' optimizers: what a paged one keeps in memory that moves between GPU and host."""


@runtime_checkable
class PagedOptimizer(Protocol):
    """An optimizer of bitsandbytes, which is paged or not."""

    is_paged: bool

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros of the shape of `p`, on its device; paged if the optimizer is and `p` is large and on a GPU."""
        ...


def pack(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, as "<entry>/<parameter>", and all else as JSON: by parameter, common to all, and by group.

    Raises:
        TypeError: the state holds something that is neither.
    """
    tensors: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[str, Any] = {}
    common: dict[str, Any] = {}
    held: Mapping[Any, Any] = optimizer.state  # torch promises tensors for keys, and not everyone keeps to it
    for key, values in held.items():
        if isinstance(key, str):  # a few keep what belongs to no parameter there too
            common[key] = _packed(values, f"{key}/common", torch.device("cpu"), tensors)
            continue
        name = names[id(key)]
        state[name] = {entry: _packed(value, f"{entry}/{name}", key.device, tensors) for entry, value in values.items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        device = group["params"][0].device
        own = {key: value for key, value in group.items() if key != "params"}
        groups.append({key: _packed(value, f"{key}/group.{index}", device, tensors) for key, value in own.items()})
    return tensors, {"state": state, "common": common, "groups": groups}


def unpack(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any],
) -> None:
    """Give a freshly built `optimizer` the state that `pack` took from its like. A paged optimizer's moments are paged
    again where it would page them, wherever they were saved.

    Raises:
        KeyError, ValueError: of another optimizer, or over other parameters.
    """
    if len(rest["groups"]) != len(optimizer.param_groups):
        raise ValueError(f"{len(rest['groups'])} groups of parameters, not {len(optimizer.param_groups)}")
    for name, values in rest["state"].items():
        parameter = parameters[name]
        state = {entry: _unpacked(value, parameter.device, tensors) for entry, value in values.items()}
        if isinstance(optimizer, PagedOptimizer) and optimizer.is_paged:
            state |= {entry: _paged(optimizer, parameter, state[entry]) for entry in PAGED_ENTRIES if entry in state}
        optimizer.state[parameter] = state
    held: dict[Any, Any] = optimizer.state
    for key, value in rest["common"].items():
        held[key] = _unpacked(value, torch.device("cpu"), tensors)
    for group, saved in zip(optimizer.param_groups, rest["groups"], strict=True):
        missing = group.keys() - saved.keys() - {"params"}  # some add to a group at their first step
        if missing:
            raise ValueError(f"other settings of the optimizer: {', '.join(sorted(missing))}")
        device = group["params"][0].device
        group.update({key: _unpacked(value, device, tensors) for key, value in saved.items()})


def _paged(optimizer: PagedOptimizer, parameter: nn.Parameter, moment: Tensor) -> Tensor:
    """`moment` in a buffer of the optimizer's own making."""
    # Of the moment's shape, which may be two of the parameter's, without its memory.
    like = parameter.detach().flatten()[:1].expand(moment.shape)
    return optimizer.get_state_buffer(like, dtype=moment.dtype).copy_(moment)


_PLAIN = (str, bool, int, type(None))


def _packed(value: Any, name: str, device: torch.device, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; what JSON has not is an object with one key that says what it was."""
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
    """The name of an item of `name`: "GG/layer.a" has "GG.0/layer.a"."""
    entry, _, owner = name.partition("/")
    return f"{entry}.{key}/{owner}"


def _unpacked(value: Any, device: torch.device, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, device, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        # A copy: what two parameters share may have one tensor in the file.
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
