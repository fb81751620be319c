"""Files read ahead by a thread: whole and right, or an error where the file is asked for."""

import errno
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.base.errors import DiskError
from simpletuner.memory.reader import FileReader, read_file

SIZES = (1000, 700, 1000, 1, 512)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = []
    for number, size in enumerate(SIZES):
        found.append(tmp_path / f"{number}.weights")
        found[-1].write_bytes(os.urandom(size))
    return found


def reader(count: int = 2) -> FileReader:
    return FileReader([torch.empty(max(SIZES), dtype=torch.uint8) for _ in range(count)])


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("weights")}


def is_content(found: Tensor, file: Path) -> bool:
    return found.numpy().tobytes() == file.read_bytes()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("guess", ["none", "right", "wrong"])
def test_whatever_was_begun_the_content_is_that_of_the_file_asked_for(
    files: list[Path], count: int, guess: str
) -> None:
    ours = reader(count)
    for turn in range(3):
        for index, file in enumerate(files):
            assert is_content(ours.content(file, SIZES[index]), file), turn
            following = (index + {"none": 0, "right": 1, "wrong": 3}[guess]) % len(files)
            if guess != "none":
                ours.begin(files[following], SIZES[following])
    assert ours.reads == 15
    assert ours.reads_ahead == (14 if guess == "right" else 0)


def test_one_content_stays_while_the_next_file_is_read(files: list[Path]) -> None:
    ours = reader()
    first = ours.content(files[0], SIZES[0])
    ours.begin(files[1], SIZES[1])
    second = ours.content(files[1], SIZES[1])
    assert is_content(first, files[0])
    assert is_content(second, files[1])


class Copy:
    """Stands for a CUDA event of a copy that takes as long as it is told to."""

    def __init__(self) -> None:
        self._is_done = threading.Event()
        self.was_waited_for = threading.Event()

    def finish(self) -> None:
        self._is_done.set()

    def synchronize(self) -> None:
        self.was_waited_for.set()
        assert self._is_done.wait(10)


@pytest.mark.parametrize("count", [1, 2])
def test_a_buffer_is_not_overwritten_before_its_copy_has_ended(files: list[Path], count: int) -> None:
    ours, copy = reader(count), Copy()
    first = ours.content(files[0], SIZES[0])
    ours.keep_until(copy)
    if count == 2:
        assert is_content(ours.content(files[1], SIZES[1]), files[1])
    ours.begin(files[2], SIZES[2])
    assert copy.was_waited_for.wait(10)
    time.sleep(0.05)
    assert is_content(first, files[0])
    copy.finish()
    assert is_content(ours.content(files[2], SIZES[2]), files[2])
    assert not is_content(first, files[0])


def broken(file: Path, how: str) -> str:
    """Break `file`; returns what the error says of it."""
    if how == "vanished":
        file.unlink()
        return f"{file} cannot be read: No such file or directory."
    if how == "a folder":
        file.unlink()
        file.mkdir()
        return f"{file} cannot be read: Is a directory."
    content = file.read_bytes()
    file.write_bytes(content[:-1] if how == "cut" else content + b"1")
    return f"{file} has {len(content) + (-1 if how == 'cut' else 1)} bytes instead of {len(content)}."


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("how", ["vanished", "a folder", "cut", "longer"])
def test_what_cannot_be_read_is_an_error_for_who_asks_for_it(files: list[Path], how: str, begun: bool) -> None:
    ours = reader()
    message = broken(files[2], how)
    if begun:
        ours.begin(files[2], SIZES[2])
    with pytest.raises(DiskError) as caught:
        ours.content(files[2], SIZES[2])
    assert str(caught.value).startswith(f"{message} Run the same command again: files of weights that are missing")
    assert is_content(ours.content(files[0], SIZES[0]), files[0])


def test_an_error_of_the_disk_names_the_file(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DiskError, match=r"0\.weights cannot be read: Input/output error\."):
        read_file(files[0], torch.empty(SIZES[0], dtype=torch.uint8))


def test_a_failed_read_that_nobody_asks_for_is_forgotten(files: list[Path]) -> None:
    ours = reader()
    ours.begin(files[0].with_name("nowhere"), 3)
    assert is_content(ours.content(files[1], SIZES[1]), files[1])


def test_the_thread_ends_with_the_reader(files: list[Path]) -> None:
    before = threads()
    ours = reader()
    ours.content(files[0], SIZES[0])
    (thread,) = threads() - before
    del ours
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
