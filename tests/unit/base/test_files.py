import errno
import os
import threading
from pathlib import Path

import pytest
from tests.file_faults import (
    Fault,
    a_folder,
    broken_link,
    files_of_at_most,
    forbidden,
    foreign,
    link_loop,
    rights_of_a_user,
)

from simpletuner.base.errors import CheckpointError, ConfigError, DataError, DiskError
from simpletuner.base.files import DISK, FILE_FAULTS, DirectoryLock, file_errors_reported, with_home, write_atomic


def test_a_lock_is_held_or_it_is_free_whatever_its_file_says(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "lock")
    assert (lock.is_held(), lock.pid()) == (False, None)
    with lock:
        assert (DirectoryLock(lock.path).is_held(), lock.pid()) == (True, os.getpid())
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"), DirectoryLock(lock.path):
            pass
    lock.path.write_text("1\n")  # as a killed process leaves it
    assert (lock.is_held(), lock.pid()) == (False, 1)
    lock.path.write_text("damaged")
    assert lock.pid() is None


def test_looking_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder" / "lock", tmp_path / "file" / "lock"):
        assert (DirectoryLock(path).is_held(), DirectoryLock(path).pid()) == (False, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_looks_keeps_nobody_from_holding(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            DirectoryLock(path).is_held()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with DirectoryLock(path):
                pass
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("number", sorted(FILE_FAULTS))
def test_what_the_file_system_answers_is_no_bug(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a file"
    with pytest.raises(DiskError if number in DISK else DataError) as caught, file_errors_reported(path, DataError):
        raise OSError(number, os.strerror(number), str(path))
    problem = caught.value.problems[0]
    assert problem.found == f"cannot write {path}: {os.strerror(number)}"
    assert problem.remedy


def test_a_connection_that_breaks_is_no_answer_of_a_file_system(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), file_errors_reported(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_a_tilde_without_a_home_folder_makes_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setenv("HOME", "/home/me")
    assert with_home("~/a") == "/home/me/a"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert with_home("~nosuchuser/a") == "~nosuchuser/a"
    assert with_home("a/~") == "a/~"
    with pytest.raises(ConfigError, match=r"~/a: no home folder is known\. Set HOME"):
        with_home("~/a")


@pytest.mark.parametrize("fault", [forbidden, foreign, a_folder, link_loop, broken_link])
def test_a_fault_is_told_with_the_stages_class_and_the_path(tmp_path: Path, fault: Fault) -> None:
    path = tmp_path / "file"
    path.touch()
    fault(path)
    with (
        rights_of_a_user(),
        pytest.raises(DataError, match=f"cannot read {path}: ") as caught,
        file_errors_reported(path, DataError, doing="read"),
    ):
        path.read_bytes()
    assert caught.value.problems[0].remedy


def test_a_file_that_cannot_be_replaced_is_named_and_not_its_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    a_folder(path)
    with pytest.raises(DiskError, match=f"cannot write {path}: Is a directory"):
        write_atomic(path, b"content")
    tmp_path.chmod(0o555)
    with rights_of_a_user(), pytest.raises(DiskError, match=f"cannot write {path}: Permission denied"):
        write_atomic(path, b"content")


def test_a_full_disk_is_the_disks_at_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    with (
        path.open("ab", buffering=0) as file,
        pytest.raises(DiskError, match=r"File too large\. Free some space"),
        files_of_at_most(10),
        file_errors_reported(path, DataError),
    ):
        file.write(bytes(10))
