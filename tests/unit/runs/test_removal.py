"""Deleting a run: all of it, nothing else, never while it is needed, and to the end after a kill."""

import shutil
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.runs.events import EndEvent, EventLog
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue
from simpletuner.runs.removal import contents_of, delete_run, finish_deletions


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "output" / "cats")
    directory.create()
    with EventLog(directory.events) as log:
        log.emit(EndEvent(reason="done", exit_code=0, step=1, seconds=1))
    directory.checkpoint(1).mkdir()
    (directory.checkpoint(1) / "weights").write_bytes(b"w" * 10_000)
    directory.lora.hardlink_to(directory.checkpoint(1) / "weights")
    directory.validation(1).mkdir(parents=True)
    (directory.validation(1) / "a.png").write_bytes(b"png")
    return directory


def test_what_a_run_holds_is_counted_and_hard_links_once(run: RunDirectory) -> None:
    found = contents_of(run)
    assert (found.files, found.checkpoints, found.images, found.has_result) == (4, 1, 1, True)
    assert found.bytes < 30_000
    assert found.text == "the finished result, 1 checkpoint, 1 image, 4 files in all"


def test_what_is_not_of_the_run_is_named(run: RunDirectory) -> None:
    (run.root / "cats").mkdir()
    (run.root / "mine.txt").write_text("mine")
    assert contents_of(run).text.endswith("5 files in all, also files that do not belong to the run: cats, mine.txt")
    for number in range(7):
        (run.root / f"more-{number}").touch()
    assert contents_of(run).text.endswith("cats, mine.txt, more-0, more-1, more-2 and 4 more")


def test_a_run_is_deleted_and_what_links_lead_to_is_not(run: RunDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (run.root / "folder").symlink_to(outside)
    (run.root / "file").symlink_to(outside / "mine")
    delete_run(run, tmp_path)
    assert list(run.root.parent.iterdir()) == []
    assert (outside / "mine").read_text() == "mine"


def test_a_run_that_goes_on_or_is_starting_is_kept(run: RunDirectory, tmp_path: Path) -> None:
    for lock in (run.lock(), run.starting_lock()):
        with lock, pytest.raises(CheckpointError, match=r"in use by process \d+.*run stop"):
            delete_run(run, tmp_path)
    assert run.lora.exists()


def test_a_run_that_waits_in_the_queue_is_kept(run: RunDirectory, tmp_path: Path) -> None:
    queue = Queue.of(tmp_path)
    entry = queue.add(["--env=cats"], "output/cats")
    with pytest.raises(CheckpointError, match=f"queue entry {entry.id}, which is waiting.*run queue remove"):
        delete_run(run, tmp_path)
    queue.remove(entry.id)
    delete_run(run, tmp_path)


def test_a_folder_that_is_more_than_a_run_is_kept(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run.root)
    with pytest.raises(ConfigError, match="is a link"):
        delete_run(RunDirectory(tmp_path / "link"), tmp_path)
    with pytest.raises(ConfigError, match="is not a run"):
        delete_run(RunDirectory(run.root / "checkpoints"), tmp_path)
    shutil.copy(run.events, run.root.parent)
    with pytest.raises(ConfigError, match="contains another run"):
        delete_run(RunDirectory(run.root.parent), tmp_path)
    with pytest.raises(ConfigError, match="the working directory"):
        delete_run(run, run.root / "checkpoints")
    assert run.lora.exists()


def test_a_killed_deletion_is_finished_the_next_time(run: RunDirectory, tmp_path: Path) -> None:
    half = run.root.with_name(".dogs.0123abcd.deleted")
    shutil.copytree(run.root, half)
    finish_deletions(tmp_path)
    assert not half.exists()
    shutil.copytree(run.root, half)
    kept = run.root.with_name(".dogs.deleted")
    kept.mkdir()
    delete_run(run, tmp_path)
    assert [path.name for path in run.root.parent.iterdir()] == [kept.name]
