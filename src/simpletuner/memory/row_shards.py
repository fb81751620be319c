"""This rank's shards of trainable parameters as plain tensors, for the optimizer, EMA and checkpoints."""

import abc
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.memory.shard import RowSplit, Split, local_shard
from simpletuner.memory.world import World


class RankShards(abc.ABC):
    """This rank's shards of a model's trainable parameters, which the optimizer steps (`SteppedParameters`).

    Their gradients are sums over the ranks.
    """

    world: World
    splits: Mapping[str, Split]
    """How each tensor is split, by name."""
    parameters: dict[str, nn.Parameter]
    """This rank's shards, by name; a shard may be empty."""

    @property
    def first_elements(self) -> dict[Tensor, int]:
        """Index of the first element of each of `parameters` in its flattened whole tensor."""
        return {share: self.splits[name].first_element for name, share in self.parameters.items()}

    @abc.abstractmethod
    def take_gradients(self) -> None:
        """Move the gradients of the model's parameters to `parameters`. Call it after each backward pass."""

    @abc.abstractmethod
    def update_weights(self) -> None:
        """Make the model compute with the values of `parameters`. Call it after each change of them."""

    def local_shards(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's shards of whole tensors, by the parameters' names. Tensors of a mapped file are not read."""
        return {name: self.splits[name].of(tensor) if name in self.splits else tensor for name, tensor in whole.items()}

    def whole_tensors(self, shares: Mapping[str, Tensor], to: int) -> dict[str, Tensor] | None:
        """Gather whole tensors from the ranks' `shares` to the CPU of rank `to`, by name; None on the others.

        All ranks call it.
        """
        gathered = {name: self.splits[name].gather(share, self.world, to) for name, share in shares.items()}
        return {name: tensor for name, tensor in gathered.items() if tensor is not None} or None


class RowShards(RankShards):
    """This rank's rows of the parameters that FSDP2 shards, as plain tensors in the memory of FSDP's shards.

    FSDP sums the gradients over the ranks after each backward pass, also between accumulated micro-batches. Otherwise
    every rank would have to hold the gradients of the whole model.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        """`module` must have been sharded by `shard` with a `gather_dtype`, and its weights loaded."""
        from torch.distributed.fsdp import FSDPModule

        self.world = world
        self._modules = [fsdp_module for fsdp_module in module.modules() if isinstance(fsdp_module, FSDPModule)]
        for fsdp_module in self._modules:
            fsdp_module.unshard()  # FSDP pads uneven shards here, in new memory; views must be taken after this
            fsdp_module.reshard()
        self._sharded: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.splits = {
            name: RowSplit(tuple(weight.shape), world.rank, world.size) for name, weight in self._sharded.items()
        }
        self.parameters = {name: nn.Parameter(local_shard(weight)) for name, weight in self._sharded.items()}
        for name, rows in self.parameters.items():
            if tuple(rows.shape) != self.splits[name].local_shape:
                raise ValueError(f"{name} is split into {tuple(rows.shape)}, not {self.splits[name].local_shape}")

    def take_gradients(self) -> None:
        """Move the gradients, which FSDP sums over the ranks, to `parameters`. Call it after each backward pass."""
        for name, weight in self._sharded.items():
            if weight.grad is None:
                continue
            gradient, rows = local_shard(weight.grad), self.parameters[name]
            if rows.data_ptr() != local_shard(weight).data_ptr():
                raise RuntimeError(f"FSDP has moved the rows of {name}: steps on the old ones would be lost")
            if rows.grad is None:
                rows.grad = gradient
            else:
                rows.grad.add_(gradient)
            weight.grad = None

    @torch.no_grad()
    def share_overflow(self) -> None:
        """Make a gradient NaN on every rank if any rank has an infinite or NaN gradient.

        fp16's GradScaler only checks this rank's gradients, but must skip a step on all ranks or on none.
        """
        gradients = [rows.grad for rows in self.parameters.values() if rows.grad is not None and rows.numel()]
        flag = 0 * torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)  # 0 or NaN
        self.world.sum_([flag])
        if gradients:
            gradients[0].view(-1)[:1].add_(flag)

    def update_weights(self) -> None:
        """Free gathered weights, which are outdated. Call it after each change of `parameters`."""
        for fsdp_module in self._modules:
            fsdp_module.reshard()
