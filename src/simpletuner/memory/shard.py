"""FSDP2: each process holds a share of every weight, and a block's weights are whole only while the block computes.

Every process must run the model equally often, since each pass of a block gathers its weights from all of them. Which
collectives a pass takes: one all-gather for the parameters outside the blocks and one per block in forward, and again
one per block in backward if `reshard_after_forward`. So it is for each micro-batch, whatever the accumulation. Frozen
weights take no other; trainable ones are reduce-scattered.

Adapters are attached after `shard`, so FSDP knows nothing of them: they stay plain parameters, alike on all ranks.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from simpletuner.config.options.ranks import RankOptions
from simpletuner.memory.world import World


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded over the processes of this run."""

    device: torch.device
    """On which this process computes."""
    reshard_after_forward: bool = True
    """Whether a block's weights are let go after its forward pass and gathered again in backward."""
    cpu_offload: bool = False
    """Whether shards are kept in host memory, and copied to the device for each pass."""
    trained_as: torch.dtype | None = None
    """Where given, the parameters are trained. They are gathered as this dtype, and their gradients are summed over the
    ranks, not averaged, in fp32. fp32 parameters that are gathered as bf16 are their own masters (`memory.masters`).
    """

    @classmethod
    def of(cls, options: RankOptions, world: World) -> "Sharding | None":
        """How the options shard; None where they do not, or where one process trains."""
        if not options.fsdp_enable or world.is_alone:
            return None
        return cls(world.device, options.fsdp_reshard_after_forward, options.fsdp_cpu_offload)

    @property
    def resting(self) -> torch.device:
        """Where shards are while their block does not compute."""
        return torch.device("cpu") if self.cpu_offload else self.device


_sharded: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()
_sharded_by_others: WeakSet[nn.Module] = WeakSet()


def shard(model: nn.Module, blocks: Sequence[nn.Module], sharding: Sharding) -> None:
    """Shard each of `blocks`, then what else `model` has, over all processes, in place. Parameters become DTensors that
    are split on their first dimension; those on the meta device stay there, as shards.

    Call it before adapters are attached; blocks may be compiled or checkpointed before or after, since FSDP's hooks are
    outside of `forward` either way.

    Raises:
        ValueError: a parameter has no dimension to split.
    """
    # Imported here: one process never pays for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    scalars = [name for name, parameter in model.named_parameters() if not parameter.dim()]
    if scalars:
        raise ValueError(f"parameters without a dimension cannot be sharded: {', '.join(scalars)}")
    device = sharding.device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if sharding.cpu_offload else OffloadPolicy()
    # No param_dtype for a frozen model: torch 2.11 casts every parameter to it, int8 too. The model casts its inputs
    # itself: rotary angles stay fp32.
    trained_as = sharding.trained_as
    policy = MixedPrecisionPolicy()
    if trained_as is not None:
        policy = MixedPrecisionPolicy(param_dtype=trained_as, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=sharding.reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    # Its backward pass begins where its forward pass ends: resharded between, it would be gathered twice in a row.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    for part in model.modules() if trained_as is not None else ():
        if isinstance(part, FSDPModule):
            # The loss of a micro-batch is divided by the size of the global batch already.
            part.set_gradient_divide_factor(1.0)
            # Else a factor is a reduction of NCCL's own, which gloo lacks.
            part.set_force_sum_reduction_for_comms(True)
    _sharded[model] = sharding


def is_sharded(model: nn.Module) -> bool:
    """Whether all ranks make each pass through `model` together: `shard` or DeepSpeed's stage 3 has shared it out."""
    return model in _sharded or model in _sharded_by_others


def mark_sharded(model: nn.Module) -> None:
    """Note that DeepSpeed's stage 3 has shared `model` out."""
    _sharded_by_others.add(model)


@dataclass(frozen=True)
class RowSplit:
    """One rank's rows of a tensor that is split on dimension 0 as FSDP2 splits it: ⌈rows / ranks⌉ for each rank, until
    none are left.
    """

    shape: tuple[int, ...]
    """Of the whole tensor."""
    rank: int
    size: int
    """Ranks."""

    @property
    def rows_per_rank(self) -> int:
        return -(-self.shape[0] // self.size)

    @property
    def rows(self) -> slice:
        """This rank's."""
        first = min(self.rank * self.rows_per_rank, self.shape[0])
        return slice(first, min(first + self.rows_per_rank, self.shape[0]))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *self.shape[1:])

    @property
    def first_element(self) -> int:
        """Place of the first number of this rank's rows in the whole tensor, in row-major order."""
        first: int = self.rows.start
        return first * math.prod(self.shape[1:])

    def of(self, whole: Tensor) -> Tensor:
        """This rank's rows of `whole`, a view."""
        return whole[self.rows]

    def gather(self, rows: Tensor, world: World, to: int) -> Tensor | None:
        """The whole tensor of which each rank has its `rows`, on the CPU of rank `to`; None on the others. All
        ranks call it. Bits of any dtype arrive as they are.
        """
        padded = rows.new_zeros((self.rows_per_rank, *self.shape[1:]))
        padded[: rows.shape[0]].copy_(rows)
        parts = world.gather(padded, to)
        return None if parts is None else torch.cat([part.cpu() for part in parts])[: self.shape[0]]


@dataclass(frozen=True)
class FlatSplit:
    """One rank's piece of a tensor whose numbers, in row-major order, are split over ranks as ZeRO splits them."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    rank: int
    spans: tuple[tuple[int, int], ...]
    """First number of each rank's piece and the one after its last, in the order of ranks; a piece may be empty."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        first, last = self.spans[self.rank]
        return (last - first,)

    @property
    def first_element(self) -> int:
        """Place of the first number of this rank's piece in the whole tensor."""
        return self.spans[self.rank][0]

    def of(self, whole: Tensor) -> Tensor:
        """This rank's piece of `whole`; a view where it is contiguous."""
        return whole.reshape(-1)[slice(*self.spans[self.rank])]

    def gather(self, piece: Tensor, world: World, to: int) -> Tensor | None:
        """As `RowSplit.gather`."""
        whole = world.gather_pieces(piece, [last - first for first, last in self.spans], to)
        return None if whole is None else whole.cpu().view(self.shape)


Split = RowSplit | FlatSplit


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a whole `tensor` that this process holds once it is sharded, as a view."""
    return tensor[own_range(tuple(tensor.shape))]


def own_range(shape: tuple[int, ...]) -> slice:
    """The rows of a whole tensor of `shape` that this process holds once it is sharded."""
    return RowSplit(shape, torch.distributed.get_rank(), torch.distributed.get_world_size()).rows


def local(parameter: Tensor) -> Tensor:
    """What this process holds of `parameter`: the memory itself, without a graph. Of a plain tensor, all of it."""
    from torch.distributed.tensor import DTensor

    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of `tensors`, sharded or not."""
    return sum(local(tensor).nbytes for tensor in tensors)


def idle_pass(model: nn.Module) -> None:
    """Take part in one pass without gradients that other ranks make through a sharded `model`, and compute nothing."""
    from torch.distributed.fsdp import FSDPModule

    reshards = _sharded[model].reshard_after_forward
    for part in model.modules():  # the model itself, then its blocks in their order
        if isinstance(part, FSDPModule):
            part.unshard()
            if part is not model and reshards:
                part.reshard()
