"""Collectives between ranks are exact to the bit; a single process makes none."""

import math
import time
from typing import Any

import pytest
import torch
from tests.ranks import in_ranks
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.base.errors import RanksError
from simpletuner.memory.shard import FlatSplit
from simpletuner.memory.world import BUCKET_BYTES, ErrorKeys, World
from simpletuner.runs.ranks import RANKS_FOLDER, RankFailure


class Allocated(TorchDispatchMode):
    """Counts the bytes of the memory that tensors get inside."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.storages |= {each.data_ptr(): each for each in storages}
        return result

    @property
    def bytes(self) -> int:
        return sum(each.nbytes() for each in self.storages.values())


def gathers_pieces(world: World) -> bool:
    """Whether uneven pieces arrive as they are, on a rank that has none, and take no more memory than they do."""
    whole = torch.arange(3000, dtype=torch.bfloat16).view(3, 1000)
    split = FlatSplit((3, 1000), world.rank, ((0, 2000), (2000, 2000), (2000, 3000)))
    piece = split.of(whole).clone()
    with Allocated() as allocated:
        gathered = split.gather(piece, world, to=1)
    assert allocated.bytes <= piece.nbytes + (whole.nbytes if world.rank == 1 else 0)
    return gathered is None if world.rank != 1 else gathered is not None and gathered.equal(whole)


def exchange(world: World) -> dict[str, Any]:
    """One call of each method."""
    parts = [torch.full((3,), float(world.rank + 1)), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(())]
    large = torch.full((BUCKET_BYTES // 4 + 1,), 1.0)
    world.sum_([*parts, large])
    return {
        "sums": [part.tolist() for part in parts],
        "large": [large.min().item(), large.max().item()],
        "decided": world.decide([world.is_main, False, not world.is_main]),
        "broadcast": world.broadcast_json({"of": world.rank, "number": 0.1 + 0.2}),
        "gathered": world.gather_json("x" * world.rank),
        "pieces": gathers_pieces(world),
        "from main": world.run_on_main("a place", lambda: world, record=lambda w: w.rank, restore=lambda rank: rank)
        is (world if world.is_main else 0),
    }


def test_three_ranks_tell_each_other() -> None:
    answers = in_ranks(3, exchange)
    assert answers == [answers[0]] * 3
    assert answers[0] == {
        "sums": [[6.0] * 3, [[3.0] * 2] * 2, 3.0],
        "large": [3.0, 3.0],
        "decided": [True, False, False],
        "broadcast": {"of": 0, "number": 0.1 + 0.2},
        "gathered": ["", "x", "xx"],
        "pieces": True,
        "from main": True,
    }


def test_alone_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a collective")

    for name in ("all_reduce", "broadcast", "all_gather", "barrier", "init_process_group"):
        monkeypatch.setattr(torch.distributed, name, fail)
    world = World.single()
    tensor = torch.tensor([math.pi])
    value = {"a": object()}
    world.sum_([tensor])
    world.barrier("nothing")
    assert tensor.item() == torch.tensor(math.pi).item()
    assert world.broadcast_json(value) is value
    assert world.run_on_main("nothing", lambda: value, record=fail, restore=fail) is value
    assert world.gather_json(value)[0] is value
    assert world.decide([True, False]) == [True, False]


def meet_by_machine(world: World) -> list[Any]:
    """What a rank of two machines knows of its place, and what only the ranks of its machine exchange."""
    own = world.on_machine
    world.barrier("all")
    own.barrier("those of the machine")
    total = torch.tensor(float(world.rank))
    own.sum_([total])
    gathered, first = own.gather_json(world.rank), own.broadcast_json(world.rank)
    world.gather_json("all exchanged")
    assert world.errors is not None
    if world.rank == 3:
        world.errors.write(RankFailure(rank=3, exit_code=3, text="no images", time=0.0))
    while (told := world.errors.first()) is None:
        time.sleep(0.02)
    world.gather_json("all read")
    place = [world.machine, world.machines, own.rank, own.size, own.machines]
    return [place, total.item(), gathered, first, told.named]


@pytest.mark.slow  # four processes that import torch; tests/unit/runs/test_ranks.py has two machines without it
@pytest.mark.parametrize("starter", ["our supervisor", "torchrun"])
def test_the_ranks_of_a_machine_are_a_world_too(starter: str) -> None:
    without_folder = {RANKS_FOLDER: ""} if starter == "torchrun" else {}
    answers = in_ranks(4, meet_by_machine, machines=2, **without_folder)
    for rank, (place, total, gathered, first, told) in enumerate(answers):
        machine = rank // 2
        assert place == [machine, 2, rank % 2, 2, 1]
        assert (total, gathered, first) == (4 * machine + 1, [2 * machine, 2 * machine + 1], 2 * machine)
        assert told == "rank 3: no images"


def test_errors_that_went_with_rank_0s_store_are_looked_for_in_its_output() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    errors = ErrorKeys(2, 3, TCPStore("127.0.0.1", server.port), "10.0.0.1")
    errors.check()
    del server
    with pytest.raises(RanksError) as caught, errors.reporting_errors():
        raise RanksError.of("another process is gone")
    assert str(caught.value) == (
        "rank 0 is out of reach at 10.0.0.1, and so is the store of the processes' errors. Rank 0's output says what "
        "ended the run."
    )
