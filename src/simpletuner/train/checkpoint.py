"""Saving and restoring a run, exactly: a run that was killed ends with the bits of one that was not."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from simpletuner.base.errors import CheckpointError
from simpletuner.base.files import read_json, write_json
from simpletuner.memory.tensors import load_tensors, save_tensors
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train import optimiser_state
from simpletuner.train.ema import Ema
from simpletuner.train.optim import Averaging, as_given
from simpletuner.train.product import Product
from simpletuner.train.state import STATE_VERSION, TrainState

OPTIMISER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
PARAMETER, AVERAGE = "parameter/", "average/"


def save_checkpoint(
    run: RunDirectory,
    state: TrainState,
    product: Product,
    optimiser: torch.optim.Optimizer,
    ema: Ema | None,
    *,
    metadata: Mapping[str, str],
) -> Path:
    """Write the checkpoint of `state.step`; it appears whole or not at all. Returns its folder.

    What `product` saves is the export, for other tools; the average's lies in `ema` beside it. `optimizer.safetensors`
    holds what going on needs: the tensors that are trained, the optimiser's and the average's, each in its own
    precision, by the parameter's name; but not once more what the export holds to the bit.

    Raises:
        DiskError: no space. Earlier checkpoints are untouched.
    """
    trained = product.trained
    tensors, rest = optimiser_state.pack(optimiser, dict(trained.named_parameters()))
    if isinstance(optimiser, Averaging) or not product.holds(trained.state()):
        tensors |= {PARAMETER + name: tensor for name, tensor in trained.state().items()}
    if ema is not None and not product.holds(ema.state()):
        tensors |= {AVERAGE + name: tensor for name, tensor in ema.state().items()}
    folder = run.checkpoint(state.step)
    with checkpoints.building(folder) as part:
        with as_given(optimiser):
            product.save(part, trained.state(), metadata)
        if ema is not None:
            product.save(part / EMA_FOLDER, ema.state(), metadata)
        save_tensors(part / OPTIMISER_NAME, tensors, {"format": "pt"})
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
    folder: Path, state: TrainState, product: Product, optimiser: torch.optim.Optimizer, ema: Ema | None
) -> None:
    """Put what is trained, the freshly built optimiser and the average back to where `folder` left them.

    Raises:
        CheckpointError: the files are of other weights or another optimiser.
    """
    path = folder / OPTIMISER_NAME
    try:
        tensors = load_tensors(path)
        trained = product.trained
        trained.load(_below(PARAMETER, tensors) or product.saved(folder))
        optimiser_state.unpack(optimiser, dict(trained.named_parameters()), tensors, state.optimiser)
        if ema is not None:
            ema.load(_below(AVERAGE, tensors) or product.saved(folder / EMA_FOLDER))
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError.of(
            f"{path} does not fit this run ({error})",
            "the weights and the optimiser it was saved with",
            "Start over with --resume_from_checkpoint='' and another --output_dir.",
        ) from None


def _below(mark: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)}
