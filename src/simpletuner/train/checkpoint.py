"""Saving and restoring a run, exactly: a run that was killed ends with the bits of one that was not."""

from collections.abc import Mapping
from pathlib import Path

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
from simpletuner.runs.layout import EMA_FOLDER, LORA_NAME, RunDirectory
from simpletuner.train import optimiser_state
from simpletuner.train.ema import Ema
from simpletuner.train.optim import as_given
from simpletuner.train.state import STATE_VERSION, TrainState

OPTIMISER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
PARAMETER, AVERAGE = "parameter/", "average/"


def save_checkpoint(
    run: RunDirectory,
    state: TrainState,
    adapter: Adapter,
    optimiser: torch.optim.Optimizer,
    ema: Ema | None,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    """Write the checkpoint of `state.step`; it appears whole or not at all. Returns its folder.

    `pytorch_lora_weights.safetensors` is the export, for other tools. `optimizer.safetensors` holds what going on
    needs: the tensors that are trained, the optimiser's and the average's, each in its own precision, by the
    parameter's name. The average is exported beside the live adapter.

    Raises:
        DiskError: no space. Earlier checkpoints are untouched.
    """
    tensors, rest = optimiser_state.pack(optimiser, dict(adapter.named_parameters()))
    tensors |= {PARAMETER + name: tensor for name, tensor in adapter.state().items()}
    if ema is not None:
        tensors |= {AVERAGE + name: tensor for name, tensor in ema.state().items()}
    folder = run.checkpoint(state.step)
    with checkpoints.building(folder) as part:
        with as_given(optimiser):
            save_lora(part / LORA_NAME, adapter, metadata=metadata, dtype=dtype)
            if ema is not None:
                (part / EMA_FOLDER).mkdir()
                with ema.applied():
                    save_lora(part / EMA_FOLDER / LORA_NAME, adapter, metadata=metadata, dtype=dtype)
        # Copies: what two parameters share, as 8-bit optimisers do, cannot stand in the file as one.
        on_cpu = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
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


def restore(
    folder: Path, state: TrainState, adapter: Adapter, optimiser: torch.optim.Optimizer, ema: Ema | None
) -> None:
    """Put the adapter, the freshly built optimiser and the average back to where `folder` left them.

    Raises:
        CheckpointError: the file is of another adapter or optimiser.
    """
    path = folder / OPTIMISER_NAME
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        adapter.load(_below(PARAMETER, tensors))
        optimiser_state.unpack(optimiser, dict(adapter.named_parameters()), tensors, state.optimiser)
        if ema is not None:
            ema.load(_below(AVERAGE, tensors))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError.of(
            f"{path} does not fit this run ({error})",
            "the adapter and the optimiser it was saved with",
            "Start over with --resume_from_checkpoint='' and another --output_dir.",
        ) from None


def _below(mark: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)}
