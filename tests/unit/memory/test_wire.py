"""Bytes between processes, against the sums that a ring sends."""

import pytest

from simpletuner.base.sizes import format_seconds
from simpletuner.memory.wire import Wire, all_reduce_bytes, shard_exchange_bytes


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_sends_each_shard_to_all_others(ranks: int) -> None:
    size = 24 * 5
    shard = size // ranks
    sent_in_a_gather = sum(shard for _ in range(ranks - 1))  # one shard to the neighbor at each turn
    assert shard_exchange_bytes(size, ranks) == sent_in_a_gather
    assert all_reduce_bytes(size, ranks) == 2 * sent_in_a_gather


def test_seconds_are_bytes_by_speed() -> None:
    wire = Wire(40, 10)
    assert wire.total == 50
    assert wire.seconds() == {"NVLink": 50 / 450e9, "PCIe 4 x16": 50 / 25e9}
    assert wire.summary()["total"] == 50
    apart = Wire(40, 10, machines=2)
    assert apart.total == 50
    assert apart.seconds()["100 Gbit/s Ethernet"] == 8 * 50 / 100e9
    assert min(apart.seconds().values()) > min(wire.seconds().values()), "the network is the slower link"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.000897, "0.897 ms"), (0.01611, "16.1 ms"), (0.9994, "999 ms"), (0.9996, "1 s"), (2.5287, "2.53 s")],
)
def test_seconds_are_told_with_three_digits(seconds: float, told: str) -> None:
    assert format_seconds(seconds) == told
