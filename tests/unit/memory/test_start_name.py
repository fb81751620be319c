"""Ranks that torchrun starts again meet in a store that holds what earlier ones left."""

import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch's own stubs

from simpletuner.memory.rendezvous import start_name
from simpletuner.runs.ranks import RankPlace

PATIENCE = datetime.timedelta(seconds=30)


def test_each_start_has_a_name_of_its_own_whoever_comes_first() -> None:
    store = HashStore()

    def named(rank: int, size: int) -> str:
        if rank == 0:
            time.sleep(0.2)  # the others read the name of the start before
        return start_name(store, RankPlace(rank, size, rank, size), PATIENCE)

    starts = []
    for size in (3, 3, 2, 4):
        with ThreadPoolExecutor(size) as pool:
            names = list(pool.map(named, range(size), [size] * size))
        assert len(set(names)) == 1
        starts += names[:1]
    assert len(set(starts)) == 4


def test_a_start_without_rank_0_has_no_name() -> None:
    store = HashStore()
    store.set("start", "of ranks that are gone")
    with pytest.raises(RuntimeError, match="rank 0 has not named this start"):
        start_name(store, RankPlace(1, 2, 1, 2), datetime.timedelta(seconds=0.2))
