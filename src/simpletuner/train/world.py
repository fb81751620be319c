"""The processes that train together, as one of them sees it."""

from dataclasses import dataclass

import torch

from simpletuner.memory.device import choose_device


@dataclass(frozen=True)
class World:
    """This process's place among those that share a run, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def single(cls) -> "World":
        """One process, on the GPU if there is one."""
        return cls(rank=0, size=1, device=choose_device())

    @property
    def is_main(self) -> bool:
        """Whether this process writes what a run has once: events, checkpoints, images."""
        return self.rank == 0
