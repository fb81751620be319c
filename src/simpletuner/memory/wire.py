"""Bytes that each process sends in an optimizer step; it receives as many. Independent of models and of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINKS: Mapping[str, float] = {"NVLink": 450e9, "PCIe 4 x16": 25e9}
"""Bytes per second and direction between two GPUs: NVIDIA's figure for an H100's NVLink, and about the usable part of
the 32 GB/s of 16 lanes of PCIe 4. Not measured by us."""

NETWORKS: Mapping[str, float] = {
    "400 Gbit/s InfiniBand": 50e9,
    "100 Gbit/s Ethernet": 12.5e9,
    "10 Gbit/s Ethernet": 1.25e9,
}
"""Bytes per second and direction between two machines: the bit rates in the names. Not measured by us."""


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` processes sends in a ring all-reduce of `size` bytes."""
    return 2 * shard_exchange_bytes(size, ranks)  # a reduce-scatter and an all-gather


def shard_exchange_bytes(size: int, ranks: int) -> int:
    """Bytes that each of `ranks` processes sends to all-gather or reduce-scatter `size` bytes: all shards but one."""
    return (ranks - 1) * size // ranks


@dataclass(frozen=True)
class Wire:
    """Bytes that one process sends in an optimizer step."""

    gathered: int
    """Bytes of weights: for the passes (FSDP2, ZeRO-3), or after the step (ZeRO-1, ZeRO-2)."""
    reduced: int
    """Bytes of gradients."""
    machines: int = 1

    @property
    def total(self) -> int:
        return self.gathered + self.reduced

    @property
    def links(self) -> Mapping[str, float]:
        """Possible links and their bytes per second: `LINKS`, or `NETWORKS` with several machines."""
        return LINKS if self.machines == 1 else NETWORKS

    def seconds(self) -> dict[str, float]:
        """Estimated seconds of a step's transfers over each of `links`, if compute hides none of them.

        A ring passes through each machine once, so a machine sends as much over its network as one process does. The
        slowest link determines the time.
        """
        return {name: self.total / speed for name, speed in self.links.items()}

    def summary(self) -> dict[str, Any]:
        """The bytes and times as JSON."""
        return {"gathered": self.gathered, "reduced": self.reduced, "total": self.total, "seconds": self.seconds()}
