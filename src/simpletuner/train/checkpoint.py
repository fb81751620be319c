"""Saving and restoring a run, exactly: a run that was killed ends with the bits of one that was not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import read_json, write_atomic, write_json
from simpletuner.flux2.export import save_lora
from simpletuner.flux2.lora import Adapter
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.train.state import STATE_VERSION, TrainState

OPTIMISER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"


def save_checkpoint(
    run: RunDirectory,
    state: TrainState,
    adapter: Adapter,
    optimiser: torch.optim.Optimizer,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    """Write the checkpoint of `state.step`; it appears whole or not at all. Returns its folder.

    `pytorch_lora_weights.safetensors` is the export, for other tools. `optimizer.safetensors` holds what going on
    needs: the live adapter tensors and the optimiser's, in full precision, by the parameter's name.

    Raises:
        DiskError: no space. Earlier checkpoints are untouched.
    """
    tensors, rest = _optimiser_state(adapter, optimiser)
    tensors |= {f"parameter/{name}": tensor for name, tensor in adapter.state().items()}
    folder = run.checkpoint(state.step)
    with checkpoints.building(folder) as part:
        save_lora(part / LORA_NAME, adapter, metadata=metadata, dtype=dtype)
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(part / OPTIMISER_NAME, save(on_cpu, {"format": "pt"}))
        write_json(part / STATE_NAME, state.model_copy(update={"optimiser": rest}).model_dump(mode="json"))
    return folder


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint.

    Raises:
        CheckpointError: it is of another version or cannot be read.
    """
    path = folder / STATE_NAME
    try:
        value = read_json(path)
        if isinstance(value, dict) and value.get("version") != STATE_VERSION:
            raise CheckpointError.of(
                f"{path} is of version {value.get('version')}",
                f"version {STATE_VERSION}",
                "It was written by another release of this program: go on with that one, or start over with "
                "--resume_from_checkpoint='' and another --output_dir.",
            )
        return TrainState.model_validate(value)
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError.of(f"{path} cannot be read ({reason})", "a checkpoint of this program") from None


def restore(folder: Path, state: TrainState, adapter: Adapter, optimiser: torch.optim.Optimizer) -> None:
    """Put the adapter and the optimiser back to where `folder` left them.

    Raises:
        CheckpointError: the file is of another adapter or optimiser.
    """
    path = folder / OPTIMISER_NAME
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        mark = "parameter/"
        adapter.load({name[len(mark) :]: value for name, value in tensors.items() if name.startswith(mark)})
        optimiser.load_state_dict(_optimiser_state_dict(adapter, optimiser, tensors, state.optimiser))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError.of(
            f"{path} does not fit this run ({error})",
            "the adapter and the optimiser it was saved with",
            "Start over with --resume_from_checkpoint='' and another --output_dir.",
        ) from None


def _optimiser_state(
    adapter: Adapter, optimiser: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimiser's state by parameter name: tensors as "<entry>/<parameter>", the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, parameter in adapter.named_parameters():
        for entry, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{entry}/{name}"] = value
            else:
                rest.setdefault(name, {})[entry] = value
    return tensors, rest


def _optimiser_state_dict(
    adapter: Adapter,
    optimiser: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What `load_state_dict` wants: the state by the parameter's place in the optimiser's groups."""
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        if entry != "parameter":
            by_name.setdefault(name, {})[entry] = value
    for name, values in rest.items():
        by_name.setdefault(name, {}).update(values)
    ordered = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    places = {names[id(parameter)]: place for place, parameter in enumerate(ordered)}
    state = {places[name]: values for name, values in by_name.items()}
    return {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
