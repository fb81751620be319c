"""Save and restore a run exactly: a run that was killed and resumed ends with the bits of an uninterrupted one."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError, RanksError, UserError, error_class
from simpletuner.base.files import file_errors_reported, read_json, write_json
from simpletuner.base.parts import delete_path
from simpletuner.memory.machines import create_missing, remove_created, send_folder, shared_folders
from simpletuner.memory.row_shards import RankShards
from simpletuner.memory.shard import Split
from simpletuner.memory.shares import RankTensor, load_shares, write_shares
from simpletuner.memory.tensors import INTEGERS, save_tensors
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train import optimizer_state
from simpletuner.train.ema import Ema
from simpletuner.train.optim import Averaging, averaged_weights
from simpletuner.train.product import Product
from simpletuner.train.state import STATE_VERSION, TrainState
from simpletuner.train.trained import Trainable

OPTIMIZER_STEM = "optimizer"
OPTIMIZER_NAME = f"{OPTIMIZER_STEM}.safetensors"
STATE_NAME = "state.json"
PARAMETER, AVERAGE = "parameter/", "average/"
"""Prefixes of tensor names in `OPTIMIZER_NAME`: trained parameters, and their moving average."""
T = TypeVar("T")


def save_checkpoint(
    run: RunDirectory,
    state: TrainState,
    product: Product,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    *,
    metadata: Mapping[str, str],
    world: World,
) -> Path:
    """Write the checkpoint of `state.step` atomically. Returns its folder. All ranks call it.

    A checkpoint contains the export of `product`, for other tools, and that of the moving average in the subfolder
    `ema`. `optimizer.safetensors` contains the tensors for an exact resume, by parameter name and each in its own
    dtype: trained parameters, optimizer state and average. Parameters that the export keeps exactly are not stored
    twice. Several ranks write several files; each tensor in them is whole, so that any number of ranks can resume.

    Raises:
        DiskError: no space, on any rank. Earlier checkpoints are untouched.
        CheckpointError: ranks that should hold the same tensors do not.
    """
    trained = product.trained
    tensors, scalar_state = optimizer_state.pack(optimizer, dict(trained.named_parameters()))
    if isinstance(optimizer, Averaging) or not product.export_is_exact(trained.state()):
        tensors |= {PARAMETER + name: tensor for name, tensor in trained.state().items()}
    if ema is not None and not product.export_is_exact(ema.state()):
        tensors |= {AVERAGE + name: tensor for name, tensor in ema.state().items()}
    folder = run.checkpoint(state.step)
    saved_state = state.model_copy(update={"optimizer": scalar_state}).model_dump(mode="json")
    if world.is_alone:
        with checkpoints.building(folder) as part:
            with averaged_weights(optimizer):
                product.save(part, trained.state(), metadata, world)
            if ema is not None:
                product.save(part / EMA_FOLDER, ema.state(), metadata, world)
            save_tensors(part / OPTIMIZER_NAME, tensors, {"format": "pt"})
            write_json(part / STATE_NAME, saved_state)
        return folder

    if trained.shards is None:
        averages = {} if ema is None else {AVERAGE + name: tensor for name, tensor in ema.state().items()}
        check_replicas(tensors | {PARAMETER + name: each for name, each in trained.state().items()} | averages, world)
    part = checkpoints.unfinished(folder)
    rank_tensors = {name: RankTensor(tensor, _split(name, tensor, trained)) for name, tensor in tensors.items()}

    hashes: dict[str, str] = {}

    def begin() -> None:
        if world.is_main:
            checkpoints.begin(folder)

    def write_state() -> dict[str, str]:
        if world.is_main:
            write_json(part / STATE_NAME, saved_state)
        return write_shares(part, OPTIMIZER_STEM, rank_tensors, {"format": "pt"}, world)[0]

    def write_export() -> dict[str, str]:
        with averaged_weights(optimizer):
            return product.save(part, trained.state(), metadata, world)

    def write_average() -> dict[str, str]:
        written = {} if ema is None else product.save(part / EMA_FOLDER, ema.state(), metadata, world)
        return {f"{EMA_FOLDER}/{name}": digest for name, digest in written.items()}

    def finish() -> None:
        if world.is_main:
            checkpoints.finish(folder, hashes)

    try:
        on_all_ranks(world, begin, folder)
        # Check after each: a rank that failed in one write would be missing in the gathers of the next.
        for write in (write_state, write_export, write_average):
            for written in on_all_ranks(world, write, folder):
                hashes |= written
        on_all_ranks(world, finish, folder)
    finally:
        if world.is_main:
            delete_path(part)
    return folder


@contextlib.contextmanager
def on_each_machine(folder: Path, run: RunDirectory, world: World) -> Iterator[Path]:
    """A context with a local path of rank 0's checkpoint `folder`. Where machines do not share the folder or the run
    directory, it is a copy in the run directory of this machine, deleted on exit. All ranks must enter and leave it.

    Raises:
        DiskError: a machine has no space for the copy, or it reads back differently.
        RanksError: a rank died or timed out.
    """
    if world.writing_ranks == world.size and folder.parent in shared_folders(world, [folder.parent]):
        yield folder
        return
    final = run.checkpoints / f"{folder.name}-of-machine-{world.machine}"
    copy = checkpoints.unfinished(final)
    writes_copy = world.machine > 0 and world.on_machine.is_main
    created_folders = create_missing(run.checkpoints) if writes_copy else []
    try:
        if writes_copy:
            checkpoints.begin(final)
        with file_errors_reported(copy):
            send_folder(world, folder, copy)
        if writes_copy and (damage := checkpoints.damage(copy)) is not None:
            raise DiskError.of(f"{copy}, sent by machine 0: {damage}", remedy="Check the disk, then start again.")
        world.barrier("the checkpoint on other machines")
        yield folder if world.machine == 0 else copy
        world.barrier("the checkpoint on other machines")
    finally:
        if writes_copy:
            delete_path(copy)
            remove_created(created_folders)


def on_all_ranks(world: World, work: Callable[[], T], path: Path) -> list[T]:
    """Run `work`, which writes into `path`, on each rank; returns the JSON values it returned, by rank. If it fails on
    one rank, it fails on all. Ranks wait for each other without a time limit.

    Raises:
        UserError: the error of the first rank that failed, on every rank. Other errors become a RanksError.
    """
    failure: Exception | None = None
    value: T | None = None
    try:
        with file_errors_reported(path):
            value = work()
    except RanksError:
        raise  # the other ranks cannot be reached
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        failure = error
    world.barrier(f"the ranks' writes into {path.name}")
    code = failure.exit_code if isinstance(failure, UserError) else RanksError.exit_code
    outcomes = world.gather_json([value, None if failure is None else [code, str(failure) or type(failure).__name__]])
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            raise error_class(failed[0]).of(f"rank {rank}: {failed[1]}")
    return [each for each, _ in outcomes]


def check_replicas(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare tensors that must be identical on all ranks, by a checksum of each.

    Raises:
        CheckpointError: a rank's tensors differ from those that most ranks have; in a tie, from the lowest rank's.
    """
    checksums = world.gather_json({name: checksum(tensor) for name, tensor in tensors.items()})
    texts = [json.dumps(each, sort_keys=True) for each in checksums]
    majority = checksums[texts.index(max(texts, key=texts.count))]  # in a tie, the lowest rank's
    for rank, each in enumerate(checksums):
        differing = sorted(name for name in majority.keys() | each.keys() if majority.get(name) != each.get(name))
        if differing:
            raise CheckpointError.of(
                f"rank {rank} has diverged from the other ranks: {len(differing)} of {len(majority)} tensors differ, "
                f"such as {differing[0]}",
                "the same trained tensors and optimizer state on every rank",
                "Nothing was saved. The same command resumes from the last checkpoint; if this happens again, check "
                f"the GPU of rank {rank} for faults.",
            )


def checksum(tensor: Tensor) -> int:
    """The sum of the elements' bit patterns, read as integers: a single flipped bit changes it."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _split(name: str, tensor: Tensor, trained: Trainable) -> Split | None:
    """The split of the tensor "<entry>/<parameter>": the parameter's if the tensor has its local shape, else None."""
    split = None if trained.shards is None else trained.shards.splits.get(name.partition("/")[2])
    return split if split is not None and tuple(tensor.shape) == split.local_shape else None


def read_state(folder: Path) -> TrainState:
    """The state in a checkpoint.

    Raises:
        CheckpointError: it has another version or cannot be read.
    """
    path = folder / STATE_NAME
    try:
        value = read_json(path)
        if isinstance(value, dict) and value.get("version") != STATE_VERSION:
            raise CheckpointError.of(
                f"{path} has version {value.get('version')}",
                f"version {STATE_VERSION}",
                "Another release of this program wrote it: resume with that release, or start over with "
                "--resume_from_checkpoint='' and another --output_dir.",
            )
        return TrainState.model_validate(value)
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError.of(f"{path} cannot be read ({reason})", "a checkpoint of this program") from None


def restore(
    folder: Path, state: TrainState, product: Product, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> None:
    """Load the trainable parameters, the freshly built optimizer's state and the average from the checkpoint `folder`.

    Raises:
        CheckpointError: the files belong to other weights or another optimizer.
    """
    path = folder / OPTIMIZER_NAME
    trained = product.trained
    shards = trained.shards

    def local_shards(wholes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return wholes if shards is None else shards.local_shards(wholes)

    try:
        tensors = load_shares(folder, OPTIMIZER_STEM)
        trained.load(local_shards(_with_prefix(PARAMETER, tensors) or product.read_export(folder)))
        moments = tensors if shards is None else {name: _local(name, each, shards) for name, each in tensors.items()}
        optimizer_state.unpack(optimizer, dict(trained.named_parameters()), moments, state.optimizer)
        if ema is not None:
            ema.load(local_shards(_with_prefix(AVERAGE, tensors) or product.read_export(folder / EMA_FOLDER)))
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError.of(
            f"{path} does not fit this run ({error})",
            "the weights and the optimizer that it was saved with",
            "Start over with --resume_from_checkpoint='' and another --output_dir.",
        ) from None


def _local(name: str, tensor: Tensor, shards: RankShards) -> Tensor:
    """This rank's shard of the tensor "<entry>/<parameter>", or the tensor itself if it has another shape."""
    split = shards.splits.get(name.partition("/")[2])
    return tensor if split is None or tuple(tensor.shape) != split.shape else split.of(tensor)


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by name without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
