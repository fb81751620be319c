"""FSDP2: each rank holds a shard of every weight, and a block's weights are all-gathered only while it computes.

All ranks must run the model equally often, since each pass of a block gathers its weights from all of them. The
collectives of a pass are: in forward one all-gather for the parameters outside the blocks and one per block; in
backward one per block if `reshard_after_forward`. This holds for each micro-batch, with gradient accumulation too.
Gradients of trainable weights are also reduce-scattered.

Adapters are attached after `shard`, so FSDP does not manage them: they stay plain parameters, replicated on all ranks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from simpletuner.config.options.ranks import RankOptions
from simpletuner.memory.world import World


@dataclass(frozen=True)
class Sharding:
    """Settings for sharding a model over the ranks of a run."""

    device: torch.device
    """The device on which this process computes."""
    reshard_after_forward: bool = True
    """Whether a block's gathered weights are freed after its forward pass and gathered again in backward."""
    cpu_offload: bool = False
    """Whether shards are kept in host memory and copied to the device for each pass."""
    gather_dtype: torch.dtype | None = None
    """None for a frozen model; otherwise the dtype in which trainable parameters are gathered. Their gradients are
    summed over the ranks in fp32, not averaged. fp32 parameters that are gathered as bf16 are their own masters
    (`memory.masters`)."""

    @classmethod
    def of(cls, options: RankOptions, world: World) -> "Sharding | None":
        """The options' sharding; None without `fsdp_enable`, or with a single process."""
        if not options.fsdp_enable or world.is_alone:
            return None
        return cls(world.device, options.fsdp_reshard_after_forward, options.fsdp_cpu_offload)

    @property
    def shard_device(self) -> torch.device:
        """Device of the shards while their block does not compute."""
        return torch.device("cpu") if self.cpu_offload else self.device


_sharded: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()
_sharded_by_deepspeed: WeakSet[nn.Module] = WeakSet()


def shard(model: nn.Module, blocks: Sequence[nn.Module], sharding: Sharding) -> None:
    """Shard each of `blocks`, then the rest of `model`, over all ranks, in place.

    Parameters become DTensors that are split on their first dimension. Those on the meta device stay there, as shards.
    Call it before adapters are attached. Blocks may be compiled or checkpointed before or after it, since FSDP's hooks
    run outside of `forward`.

    Raises:
        ValueError: a parameter has no dimension to split.
    """
    # Imported here, because a single process does not need it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    scalars = [name for name, parameter in model.named_parameters() if not parameter.dim()]
    if scalars:
        raise ValueError(f"parameters without a dimension cannot be sharded: {', '.join(scalars)}")
    device = sharding.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.cpu_offload else OffloadPolicy()
    # No param_dtype for a frozen model: torch 2.11 would cast every parameter to it, int8 too. No cast_forward_inputs:
    # the model casts its inputs itself, and keeps rotary angles in fp32.
    gather_dtype = sharding.gather_dtype
    policy = MixedPrecisionPolicy()
    if gather_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    # Backward begins with the parameters that forward used last: resharding them would gather them twice in a row.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    for module in model.modules() if gather_dtype is not None else ():
        if isinstance(module, FSDPModule):
            # No averaging: the loss of a micro-batch is already divided by the size of the global batch.
            module.set_gradient_divide_factor(1.0)
            # Otherwise FSDP uses a reduction with a factor, which NCCL has and gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    _sharded[model] = sharding


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is sharded, by `shard` or DeepSpeed's stage 3. If so, all ranks must run each pass together."""
    return model in _sharded or model in _sharded_by_deepspeed


def mark_sharded(model: nn.Module) -> None:
    """Record that DeepSpeed's stage 3 has sharded `model`."""
    _sharded_by_deepspeed.add(model)


@dataclass(frozen=True)
class RowSplit:
    """One rank's rows of a tensor that is split on dimension 0 as FSDP2 splits it: ⌈rows / ranks⌉ rows per rank, until
    none remain.
    """

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    rank: int
    size: int
    """Number of ranks."""

    @property
    def rows_per_rank(self) -> int:
        return -(-self.shape[0] // self.size)

    @property
    def rows(self) -> slice:
        """Range of this rank's rows."""
        first = min(self.rank * self.rows_per_rank, self.shape[0])
        return slice(first, min(first + self.rows_per_rank, self.shape[0]))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *self.shape[1:])

    @property
    def first_element(self) -> int:
        """Index of this rank's first element in the flattened whole tensor, in row-major order."""
        first: int = self.rows.start
        return first * math.prod(self.shape[1:])

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of `whole`, as a view."""
        return whole[self.rows]

    def gather(self, rows: Tensor, world: World, to: int) -> Tensor | None:
        """Gather the whole tensor from all ranks' `rows` to the CPU of rank `to`; None on the others.

        All ranks call it. The result is bit-identical for every dtype.
        """
        counts = [math.prod(replace(self, rank=rank).local_shape) for rank in range(self.size)]
        whole = world.gather_pieces(rows.reshape(-1), counts, to)
        return None if whole is None else whole.cpu().view(self.shape)


@dataclass(frozen=True)
class FlatSplit:
    """One rank's piece of a tensor that is flattened in row-major order and split over ranks as ZeRO splits it."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    rank: int
    spans: tuple[tuple[int, int], ...]
    """Start and end index of each rank's piece, by rank. A piece may be empty."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        start, stop = self.spans[self.rank]
        return (stop - start,)

    @property
    def first_element(self) -> int:
        """Index of this rank's first element in the flattened whole tensor."""
        return self.spans[self.rank][0]

    def of(self, whole: Tensor) -> Tensor:
        """This rank's piece of `whole`; a view if `whole` is contiguous."""
        return whole.reshape(-1)[slice(*self.spans[self.rank])]

    def gather(self, piece: Tensor, world: World, to: int) -> Tensor | None:
        """As `RowSplit.gather`."""
        whole = world.gather_pieces(piece, [stop - start for start, stop in self.spans], to)
        return None if whole is None else whole.cpu().view(self.shape)


Split = RowSplit | FlatSplit


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a whole `tensor` that this rank holds once it is sharded, as a view."""
    return tensor[local_range(tuple(tensor.shape))]


def local_range(shape: tuple[int, ...]) -> slice:
    """Range of the rows of a whole tensor of `shape` that this rank holds once it is sharded."""
    return RowSplit(shape, torch.distributed.get_rank(), torch.distributed.get_world_size()).rows


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's shard of `parameter`, detached, sharing its memory; a plain tensor is its own shard."""
    from torch.distributed.tensor import DTensor

    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors`, sharded or not, on this rank."""
    return sum(local_shard(tensor).nbytes for tensor in tensors)


def idle_pass(model: nn.Module) -> None:
    """Take part in the collectives of one pass without gradients through a sharded `model`, without computing it."""
    from torch.distributed.fsdp import FSDPModule

    reshards = _sharded[model].reshard_after_forward
    for module in model.modules():  # the model itself, then its blocks in order
        if isinstance(module, FSDPModule):
            module.unshard()
            if module is not model and reshards:
                module.reshard()
