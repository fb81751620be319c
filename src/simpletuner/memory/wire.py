"""Bytes that each process sends in an optimizer step; it receives as many. Knows no model, and needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINKS: Mapping[str, float] = {"NVLink": 450e9, "PCIe 4 x16": 25e9}
"""Bytes a second and direction between two GPUs: what NVIDIA states of an H100's NVLink, and about what is left of the
32 GB/s of PCIe 4 with 16 lanes. Not measured here."""

NETWORKS: Mapping[str, float] = {
    "400 Gbit/s InfiniBand": 50e9,
    "100 Gbit/s Ethernet": 12.5e9,
    "10 Gbit/s Ethernet": 1.25e9,
}
"""Bytes a second and direction between two machines: the rates in the names. Not measured here."""


def all_reduce_bytes(size: int, ranks: int) -> int:
    """Sent by each of `ranks` processes to sum `size` bytes in a ring: a reduce-scatter and an all-gather."""
    return 2 * shard_exchange_bytes(size, ranks)


def shard_exchange_bytes(size: int, ranks: int) -> int:
    """Sent by each of `ranks` processes to all-gather, or to reduce-scatter, `size` bytes: all shards but one."""
    return (ranks - 1) * size // ranks


@dataclass(frozen=True)
class Wire:
    """Bytes that one process sends in an optimizer step."""

    gathered: int
    """Weights: for the passes (FSDP2, ZeRO-3), or after the step (ZeRO-1, ZeRO-2)."""
    reduced: int
    """Gradients."""
    machines: int = 1

    @property
    def total(self) -> int:
        return self.gathered + self.reduced

    @property
    def links(self) -> Mapping[str, float]:
        """What the bytes may travel over, and its speed: `LINKS`, or `NETWORKS` where there are several machines."""
        return LINKS if self.machines == 1 else NETWORKS

    def seconds(self) -> dict[str, float]:
        """Estimated time of a step's transfers over each of `links`, were nothing of it hidden behind the compute.

        A ring passes each machine once, so over its network a machine sends as much as one process does. The slower
        link decides.
        """
        return {name: self.total / speed for name, speed in self.links.items()}

    def summary(self) -> dict[str, Any]:
        """For a JSON reader."""
        return {"gathered": self.gathered, "reduced": self.reduced, "total": self.total, "seconds": self.seconds()}
