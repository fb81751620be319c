"""Which folders machines share, and whether they hold the same. What one sends: `train/test_sharded_full.py`."""

from pathlib import Path
from typing import Any

from tests.thread_ranks import ALONE, on_ranks

from simpletuner.memory.machines import differing_machine, shared_folders, with_writers
from simpletuner.memory.world import World


def test_one_machine_shares_all_and_leaves_no_mark(tmp_path: Path) -> None:
    folder = tmp_path / "not there"
    for found in (shared_folders(ALONE, [folder]), *on_ranks(2, lambda world: shared_folders(world, [folder]))):
        assert found == {folder}
    assert with_writers(ALONE, folder) == ALONE
    assert ALONE.writing_ranks == 1
    assert not folder.exists()


def test_a_folder_is_shared_where_every_machine_sees_the_same(tmp_path: Path) -> None:
    def found(world: World) -> list[str]:
        (tmp_path / f"own-{world.machine}").mkdir(exist_ok=True)
        own = tmp_path / f"own-{world.machine}" / "new" if world.machine else tmp_path / "made"
        folders = {tmp_path / "shared": "shared", own: "own"}
        shared = shared_folders(world, list(folders))
        return [name for folder, name in folders.items() if folder in shared]

    assert on_ranks(4, found, machines=2) == [["shared"]] * 4
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["made", "own-0", "own-1", "shared"], (
        "machine 1 keeps what was there, and no new folder"
    )


def test_where_the_runs_folder_is_not_shared_machine_0_writes(tmp_path: Path) -> None:
    def writers(world: World) -> list[int]:
        shared, own = (with_writers(world, tmp_path / name) for name in ("shared", f"own-{world.machine}"))
        return [shared.writing_ranks, own.writing_ranks]

    assert on_ranks(4, writers, machines=2) == [[4, 2]] * 4


def test_each_machine_looks_for_itself_and_machine_0_first() -> None:
    looked: list[int] = []

    def find(world: World) -> list[Any]:
        def make() -> str:
            looked.append(world.machine)
            return f"of machine {world.machine}"

        return [
            world.run_on_each_machine("it", make, record=lambda text: [text], restore=lambda record: record[0]),
            differing_machine(world, "the same"),
            differing_machine(world, world.machine // 2),
        ]

    values = on_ranks(6, find, machines=3)
    assert [value[0] for value in values] == [f"of machine {rank // 2}" for rank in range(6)]
    assert looked[0] == 0
    assert sorted(looked) == [0, 1, 2]
    assert [value[1:] for value in values] == [[None, (2, (0, 1))]] * 6
    looked.clear()
    assert [value[0] for value in on_ranks(2, find)] == ["of machine 0"] * 2
    assert looked == [0]
