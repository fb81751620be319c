"""Saving and restoring a run, exactly: a run that was killed ends with the bits of one that was not."""

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
from simpletuner.base.parts import discard
from simpletuner.memory.machines import make_missing, remove_made, send_folder, shared_folders
from simpletuner.memory.row_shards import Shards
from simpletuner.memory.shard import Split
from simpletuner.memory.shares import RankTensor, load_shares, write_shares
from simpletuner.memory.tensors import INTEGERS, save_tensors
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train import optimizer_state
from simpletuner.train.ema import Ema
from simpletuner.train.optim import Averaging, as_given
from simpletuner.train.product import Product
from simpletuner.train.state import STATE_VERSION, TrainState
from simpletuner.train.trained import Trained

OPTIMIZER_STEM = "optimizer"
OPTIMIZER_NAME = f"{OPTIMIZER_STEM}.safetensors"
STATE_NAME = "state.json"
PARAMETER, AVERAGE = "parameter/", "average/"
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
    """Write the checkpoint of `state.step`; it appears whole or not at all. Returns its folder. All ranks call it.

    What `product` saves is the export, for other tools; the average's lies in `ema` beside it. `optimizer.safetensors`
    holds what going on needs: the tensors that are trained, the optimizer's and the average's, each in its own
    precision, by the parameter's name; but not once more what the export holds to the bit. Several ranks write it as
    several files, with whole tensors whichever rank holds them: any number of ranks resumes from it.

    Raises:
        DiskError: no space, on any rank. Earlier checkpoints are untouched.
        CheckpointError: ranks that should hold the same tensors do not.
    """
    trained = product.trained
    tensors, rest = optimizer_state.pack(optimizer, dict(trained.named_parameters()))
    if isinstance(optimizer, Averaging) or not product.holds(trained.state()):
        tensors |= {PARAMETER + name: tensor for name, tensor in trained.state().items()}
    if ema is not None and not product.holds(ema.state()):
        tensors |= {AVERAGE + name: tensor for name, tensor in ema.state().items()}
    folder = run.checkpoint(state.step)
    saved_state = state.model_copy(update={"optimizer": rest}).model_dump(mode="json")
    if world.is_alone:
        with checkpoints.building(folder) as part:
            with as_given(optimizer):
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
    shared = {name: RankTensor(tensor, _split(name, tensor, trained)) for name, tensor in tensors.items()}

    hashes: dict[str, str] = {}

    def begin() -> None:
        if world.is_main:
            checkpoints.begin(folder)

    def write_state() -> dict[str, str]:
        if world.is_main:
            write_json(part / STATE_NAME, saved_state)
        return write_shares(part, OPTIMIZER_STEM, shared, {"format": "pt"}, world)[0]

    def write_export() -> dict[str, str]:
        with as_given(optimizer):
            return product.save(part, trained.state(), metadata, world)

    def write_average() -> dict[str, str]:
        made = {} if ema is None else product.save(part / EMA_FOLDER, ema.state(), metadata, world)
        return {f"{EMA_FOLDER}/{name}": digest for name, digest in made.items()}

    def finish() -> None:
        if world.is_main:
            checkpoints.finish(folder, hashes)

    try:
        on_all_ranks(world, begin, folder)
        # One after the other: a rank that fails in one takes no part in the gathers of the next.
        for write in (write_state, write_export, write_average):
            for made in on_all_ranks(world, write, folder):
                hashes |= made
        on_all_ranks(world, finish, folder)
    finally:
        if world.is_main:
            discard(part)
    return folder


@contextlib.contextmanager
def on_each_machine(folder: Path, run: RunDirectory, world: World) -> Iterator[Path]:
    """Inside, rank 0's checkpoint `folder` as this rank sees it: where machines do not share it or the run's folder, a
    copy in the latter, which is deleted at the end. All ranks enter and leave it.

    Raises:
        DiskError: a machine has no room for the copy, or it reads back differently.
        RanksError: a rank is gone, or is waited for in vain.
    """
    if world.writing_ranks == world.size and folder.parent in shared_folders(world, [folder.parent]):
        yield folder
        return
    final = run.checkpoints / f"{folder.name}-of-machine-{world.machine}"
    copy = checkpoints.unfinished(final)
    is_mine = world.machine > 0 and world.on_machine.is_main
    made = make_missing(run.checkpoints) if is_mine else []
    try:
        if is_mine:
            checkpoints.begin(final)
        with file_errors_reported(copy):
            send_folder(world, folder, copy)
        if is_mine and (damage := checkpoints.damage(copy)) is not None:
            raise DiskError.of(f"{copy}, sent by machine 0: {damage}", remedy="Check the disk, then start again.")
        world.barrier("the checkpoint on other machines")
        yield folder if world.machine == 0 else copy
        world.barrier("the checkpoint on other machines")
    finally:
        if is_mine:
            discard(copy)
            remove_made(made)


def on_all_ranks(world: World, work: Callable[[], T], path: Path) -> list[T]:
    """What `work` on `path` returns on each rank, JSON values by rank. If it fails on one, it counts as failed on all.
    Ranks wait for each other for as long as it takes.

    Raises:
        UserError: that of the first rank on which it failed, on every rank. Other errors arrive as a RanksError.
    """
    failure: Exception | None = None
    value: T | None = None
    try:
        with file_errors_reported(path):
            value = work()
    except RanksError:
        raise  # the others cannot be reached
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        failure = error
    world.barrier(f"what ranks write into {path.name}")
    code = failure.exit_code if isinstance(failure, UserError) else RanksError.exit_code
    told = world.gather_json([value, None if failure is None else [code, str(failure) or type(failure).__name__]])
    if failure is not None:
        raise failure
    for rank, (_, failed) in enumerate(told):
        if failed is not None:
            raise error_class(failed[0]).of(f"rank {rank}: {failed[1]}")
    return [each for each, _ in told]


def check_replicas(tensors: Mapping[str, Tensor], world: World) -> None:
    """Compare the bits of tensors that all ranks should hold alike, by a checksum of each.

    Raises:
        CheckpointError: a rank's differ from those of most ranks, or of rank 0 where there is no majority.
    """
    told = world.gather_json({name: checksum(tensor) for name, tensor in tensors.items()})
    texts = [json.dumps(each, sort_keys=True) for each in told]
    usual = told[texts.index(max(texts, key=texts.count))]  # of equally many, the first rank's
    for rank, each in enumerate(told):
        differing = sorted(name for name in usual.keys() | each.keys() if usual.get(name) != each.get(name))
        if differing:
            raise CheckpointError.of(
                f"rank {rank} has drifted from the other ranks: {len(differing)} of {len(usual)} tensors differ, such "
                f"as {differing[0]}",
                "the same trained tensors and optimizer state on every rank",
                "Nothing was saved. The same command resumes from the last checkpoint; if it happens again, look for a "
                f"fault of the GPU of rank {rank}.",
            )


def checksum(tensor: Tensor) -> int:
    """The sum of the bits of each number of `tensor`: one bit that differs changes it."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _split(name: str, tensor: Tensor, trained: Trained) -> Split | None:
    """How a tensor of the name "<entry>/<parameter>" is split: as the parameter, if it has the shape of its share."""
    split = None if trained.shards is None else trained.shards.splits.get(name.partition("/")[2])
    return split if split is not None and tuple(tensor.shape) == split.local_shape else None


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
    folder: Path, state: TrainState, product: Product, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> None:
    """Put what is trained, the freshly built optimizer and the average back to where `folder` left them.

    Raises:
        CheckpointError: the files are of other weights or another optimizer.
    """
    path = folder / OPTIMIZER_NAME
    trained = product.trained
    shards = trained.shards

    def own(whole: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return whole if shards is None else shards.locals(whole)

    try:
        tensors = load_shares(folder, OPTIMIZER_STEM)
        trained.load(own(_below(PARAMETER, tensors) or product.saved(folder)))
        moments = tensors if shards is None else {name: _local(name, each, shards) for name, each in tensors.items()}
        optimizer_state.unpack(optimizer, dict(trained.named_parameters()), moments, state.optimizer)
        if ema is not None:
            ema.load(own(_below(AVERAGE, tensors) or product.saved(folder / EMA_FOLDER)))
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError.of(
            f"{path} does not fit this run ({error})",
            "the weights and the optimizer it was saved with",
            "Start over with --resume_from_checkpoint='' and another --output_dir.",
        ) from None


def _local(name: str, tensor: Tensor, shards: Shards) -> Tensor:
    """This rank's share of a tensor of the name "<entry>/<parameter>", if it has the parameter's shape."""
    split = shards.splits.get(name.partition("/")[2])
    return tensor if split is None or tuple(tensor.shape) != split.shape else split.of(tensor)


def _below(mark: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(mark): value for name, value in tensors.items() if name.startswith(mark)}
