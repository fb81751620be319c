import errno
import os
import threading
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, DataError, DiskError
from simpletuner.base.files import DISK, FILE_FAULTS, DirectoryLock, file_errors_reported


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
