"""Trained parameters that ranks share out, as plain tensors: what an optimizer, an average and a file see."""

import abc
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.memory.shard import RowSplit, Split, local
from simpletuner.memory.world import World


class Shards(abc.ABC):
    """This rank's share of each of a model's parameters, on which the optimizer steps (`SteppedParameters`). Their
    gradients are sums over the ranks.
    """

    world: World
    splits: Mapping[str, Split]
    """How each tensor is split, by name."""
    parameters: dict[str, nn.Parameter]
    """This rank's share, by name; of some it may have nothing."""

    @property
    def first_elements(self) -> dict[Tensor, int]:
        """Place of the first number of each of `parameters` in its whole tensor."""
        return {share: self.splits[name].first_element for name, share in self.parameters.items()}

    @abc.abstractmethod
    def collect(self) -> None:
        """Move the gradients of the model's parameters to `parameters`: after each backward pass."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Let the model compute with the values of `parameters`: after each change of them."""

    def locals(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's share of whole tensors, by the parameters' names. Tensors of a mapped file are not read."""
        return {name: self.splits[name].of(tensor) if name in self.splits else tensor for name, tensor in whole.items()}

    def wholes(self, shares: Mapping[str, Tensor], to: int) -> dict[str, Tensor] | None:
        """The whole tensors of `shares`, by the parameters' names, on the CPU of rank `to`; None on the others. All
        ranks call it.
        """
        gathered = {name: self.splits[name].gather(share, self.world, to) for name, share in shares.items()}
        return {name: each for name, each in gathered.items() if each is not None} or None


class RowShards(Shards):
    """This rank's rows of the parameters that FSDP2 shards: `parameters` are plain tensors that share the memory from
    which FSDP gathers the weights.

    FSDP sums the gradients over the ranks after each backward pass, those of several micro-batches too: gradients that
    wait for the last one would be those of the whole model on every rank.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        """`module` was sharded by `shard`, with a dtype in which it trains, and has its weights."""
        from torch.distributed.fsdp import FSDPModule

        self.world = world
        self._modules = [each for each in module.modules() if isinstance(each, FSDPModule)]
        for each in self._modules:
            each.unshard()  # FSDP pads uneven shards here, in new memory: no view may be older
            each.reshard()
        self._sharded: dict[str, nn.Parameter] = dict(module.named_parameters())
        self.splits = {
            name: RowSplit(tuple(weight.shape), world.rank, world.size) for name, weight in self._sharded.items()
        }
        self.parameters = {name: nn.Parameter(local(weight)) for name, weight in self._sharded.items()}
        for name, rows in self.parameters.items():
            if tuple(rows.shape) != self.splits[name].local_shape:
                raise ValueError(f"{name} is split into {tuple(rows.shape)}, not {self.splits[name].local_shape}")

    def collect(self) -> None:
        """Move the gradients, which FSDP has summed over the ranks, to `parameters`: after each backward pass."""
        for name, weight in self._sharded.items():
            if weight.grad is None:
                continue
            gradient, rows = local(weight.grad), self.parameters[name]
            if rows.data_ptr() != local(weight).data_ptr():
                raise RuntimeError(f"FSDP has moved the rows of {name}: steps on the former ones would be lost")
            if rows.grad is None:
                rows.grad = gradient
            else:
                rows.grad.add_(gradient)
            weight.grad = None

    @torch.no_grad()
    def share_overflow(self) -> None:
        """Make a gradient NaN on every rank if one is infinite or NaN on any: fp16's GradScaler looks at this rank's
        alone, and must skip a step on all ranks or on none.
        """
        gradients = [rows.grad for rows in self.parameters.values() if rows.grad is not None and rows.numel()]
        flag = 0 * torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)  # 0, or NaN
        self.world.sum_([flag])
        if gradients:
            gradients[0].view(-1)[:1].add_(flag)

    def settle(self) -> None:
        """Drop whole weights that were gathered before: after each change of `parameters`."""
        for each in self._modules:
            each.reshard()
