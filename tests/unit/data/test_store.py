"""Cache files: the same bytes for the same content, whole or absent, checked when read."""

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.file_faults import Fault, a_folder, forbidden, link_loop, rights_of_a_user

from simpletuner.base.errors import DataError, DiskError
from simpletuner.base.files import read_json
from simpletuner.base.parts import locked_part
from simpletuner.base.storage import LocalStorage, StoredFile
from simpletuner.data.cache import store as store_module
from simpletuner.data.cache.store import CHECKING_THREADS, CHUNK, LEDGER, Store, check_all

KEY = "ab" + "0" * 62
TENSORS = {
    "rows": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([-0.0, float("inf")], dtype=torch.bfloat16),
    "length": torch.tensor(512),
}


def folder_of(store: Store) -> Path:
    folder = store.storage.local_path()
    assert folder is not None
    return folder


def path_of(store: Store) -> Path:
    return folder_of(store) / store.name(KEY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(LocalStorage(tmp_path / "cache"))
    store.write(KEY, TENSORS, {"kind": "test", "prompt": "a — b"})
    return store


def test_what_is_read_is_what_was_written(store: Store) -> None:
    found = store.read(KEY)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert torch.signbit(found["half"][0])
    assert store.check(KEY) == "sound"
    assert path_of(store).parent.name == "ab"


def test_other_programs_can_read_it(store: Store) -> None:
    with safe_open(path_of(store), "pt") as file:
        assert torch.equal(file.get_tensor("rows"), TENSORS["rows"])
        assert '"kind": "test"' in file.metadata()["simpletuner"]


def test_the_same_content_is_the_same_bytes(store: Store, tmp_path: Path) -> None:
    other = Store(LocalStorage(tmp_path / "other"))
    strided = TENSORS | {"rows": TENSORS["rows"].T.contiguous().T}
    other.write(KEY, dict(reversed(strided.items())), {"prompt": "a — b", "kind": "test"})
    assert path_of(other).read_bytes() == path_of(store).read_bytes()


def test_any_damage_is_found_and_removed(store: Store) -> None:
    """Each byte of the file in turn; also a missing and an extra end."""
    whole = path_of(store).read_bytes()
    damaged = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    for at, data in enumerate([*damaged, whole[:-1], whole + b"\0", b"", b"\xff" * 100]):
        path_of(store).write_bytes(data)
        assert store.check(KEY) == "damaged", at
        assert store.check(KEY) == "missing", at


def test_reading_what_is_not_there_names_the_file(store: Store) -> None:
    with pytest.raises(DataError, match="is missing"):
        store.read("cd" + "0" * 62)
    path_of(store).write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged, and was removed"):
        store.read(KEY)
    assert not path_of(store).exists()
    assert check_all([(store, KEY)] * 3) == ["missing"] * 3


def test_half_written_files_of_the_dead_are_swept(store: Store) -> None:
    names = (path_of(store).with_name("living.safetensors"), path_of(store).with_name(".dead.safetensors.7.part"))
    with locked_part(names[0]) as living:
        names[1].touch()
        store.sweep()
        assert living.exists()
    assert not names[1].exists()
    assert path_of(store).exists()


def test_a_full_disk_says_so_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="No space left"):
        store.write("cd" + "0" * 62, TENSORS, {})
    assert [path for path in folder_of(store).rglob("*") if path.is_file()] == [path_of(store)]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute from now, when no file is young any more."""
    now = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: now)


def unread(store: Store) -> None:
    """What only reading would find: other bytes, of the same size, that the ledger has the stamp of."""
    path = path_of(store)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ledger = store_module._Ledger(store)
    ledger._verified_now[KEY] = store.storage.stat(store.name(KEY)).stamp
    ledger.save()


@pytest.mark.usefixtures("later")
def test_a_file_that_did_not_change_is_read_once(store: Store) -> None:
    assert check_all([(store, KEY)]) == ["sound"]
    assert read_json(folder_of(store) / LEDGER)["files"].keys() == {KEY}
    unread(store)
    assert check_all([(store, KEY)]) == ["sound"], "the disk's own faults show when the file is used"
    with pytest.raises(DataError, match="is damaged, and was removed"):
        store.read(KEY)
    assert check_all([(store, KEY)]) == ["missing"]


@pytest.mark.usefixtures("later")
def test_verifying_reads_every_file(store: Store) -> None:
    check_all([(store, KEY)])
    unread(store)
    assert check_all([(store, KEY)], verify=True) == ["damaged"]


@pytest.mark.usefixtures("later")
def test_a_file_that_changed_is_read_again(store: Store) -> None:
    check_all([(store, KEY)])
    before = path_of(store).stat()
    data = path_of(store).read_bytes()
    path_of(store).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path_of(store), ns=(before.st_atime_ns, before.st_mtime_ns))  # its status change tells
    assert check_all([(store, KEY)]) == ["damaged"]


def test_a_young_file_is_read_each_time(store: Store) -> None:
    """It could change once more without another time on it."""
    assert check_all([(store, KEY)]) == ["sound"]
    assert not (folder_of(store) / LEDGER).exists()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("content", ["", "[]", '{"version": 0, "files": {}}', "\xff"])
def test_a_list_that_cannot_be_read_is_none(store: Store, content: str) -> None:
    (folder_of(store) / LEDGER).write_bytes(content.encode("latin-1"))
    assert check_all([(store, KEY)]) == ["sound"]
    assert read_json(folder_of(store) / LEDGER)["files"].keys() == {KEY}


@pytest.mark.usefixtures("later")
def test_two_runs_add_to_one_list(store: Store) -> None:
    other = "cd" + "0" * 62
    store.write(other, TENSORS, {})
    check_all([(store, KEY)])
    check_all([(store, other)])
    assert read_json(folder_of(store) / LEDGER)["files"].keys() == {KEY, other}


@pytest.mark.usefixtures("later")
def test_a_cache_that_may_only_be_read_serves_and_has_no_list(store: Store) -> None:
    folder_of(store).chmod(0o555)
    with rights_of_a_user():
        assert check_all([(store, KEY)]) == ["sound"]
        assert store.read(KEY).keys() == TENSORS.keys()
    assert not (folder_of(store) / LEDGER).exists()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("fault", [forbidden, a_folder, link_loop])
def test_a_list_that_cannot_be_read_costs_reading_the_files(store: Store, fault: Fault) -> None:
    check_all([(store, KEY)])
    fault(folder_of(store) / LEDGER)
    with rights_of_a_user():
        assert check_all([(store, KEY)]) == ["sound"]


@pytest.mark.parametrize("fault", [forbidden, a_folder, link_loop])
def test_a_cached_file_that_cannot_be_read_is_named(store: Store, fault: Fault) -> None:
    fault(path_of(store))
    with rights_of_a_user():
        for ask in (store.check, store.read):
            with pytest.raises(DiskError, match=rf"cannot read .*{KEY}") as caught:
                ask(KEY)
            assert caught.value.problems[0].remedy


@dataclass(frozen=True)
class CountedStorage(LocalStorage):
    """Counts the files that were looked at."""

    looked_at: list[str] = field(default_factory=list, compare=False)

    def stat(self, name: str) -> StoredFile:
        self.looked_at.append(name)
        return super().stat(name)


def test_keys_are_drawn_a_bounded_distance_ahead(tmp_path: Path) -> None:
    """So a million of them take no more memory than their states."""
    storage = CountedStorage(tmp_path / "empty")
    distances = []

    def keys() -> Iterator[tuple[Store, str]]:
        for number in range(5000):
            yield Store(storage), f"{number:064x}"
            distances.append(number + 1 - len(storage.looked_at))

    assert check_all(keys()) == ["missing"] * 5000
    assert len(storage.looked_at) == 5000
    assert max(distances) <= CHUNK * (4 * CHECKING_THREADS + 1)
