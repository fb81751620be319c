"""The queue, with runs that end at once: `train --help`, which is done, and a mistake, which fails."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from simpletuner.base.errors import ConfigError, DiskError
from simpletuner.runs.events import EndEvent, ErrorEvent, EventLog
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue, QueueEntry

DONE = ("--help",)
FAILS = ("--no_such_option",)
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def queue(tmp_path: Path) -> Queue:
    return Queue.of(tmp_path)


def say_nothing(_: str) -> None:
    """For who works on a queue."""


def states(queue: Queue) -> list[tuple[int, str]]:
    return [(entry.id, entry.state) for entry in queue.entries()]


def pretend_running(queue: Queue, entry: QueueEntry) -> None:
    """As the file is while a worker waits for the entry's process."""
    began = "2026-01-01T00:00:00.000+00:00"
    queue.write(entry.model_copy(update={"state": "running", "pid": 1, "began": began}))


def held_for(path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that locks `path` so long."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_entries_wait_in_the_order_they_came(queue: Queue) -> None:
    assert queue.entries() == []
    assert not queue.folder.exists()
    one = queue.add(DONE, "output/one")
    two = queue.add(DONE, "output/two", "0,1")
    assert (one.id, two.id, two.devices, two.arguments) == (1, 2, "0,1", DONE)
    assert states(queue) == [(1, "waiting"), (2, "waiting")]
    assert queue.next("") == one
    assert queue.next("0,1") == two
    assert queue.next("7") is None
    assert queue.work_is_needed() == ["", "0,1"]


def test_entries_are_reordered_by_hand(queue: Queue) -> None:
    for name in "abcd":
        queue.add(DONE, f"output/{name}")
    queue.move(4, "top")
    assert states(queue) == [(4, "waiting"), (1, "waiting"), (2, "waiting"), (3, "waiting")]
    queue.move(1, "down")
    queue.move(3, "up")
    assert [number for number, _ in states(queue)] == [4, 2, 3, 1]
    queue.move(4, 99)
    queue.move(4, "down")  # it is the last
    queue.move(2, "up")  # it is the first
    assert [number for number, _ in states(queue)] == [2, 3, 1, 4]
    assert queue.next("") == queue.entries()[0]
    # What is added comes last, whatever was ordered before.
    queue.add(DONE, "output/e")
    assert [number for number, _ in states(queue)] == [2, 3, 1, 4, 5]


def test_what_runs_or_ended_has_no_turn(queue: Queue) -> None:
    first = queue.add(DONE, "output/a")
    queue.add(DONE, "output/b")
    queue.move(2, "top")
    with queue.process_lock(1):
        pretend_running(queue, first)
        assert states(queue) == [(1, "running"), (2, "waiting")]
        with pytest.raises(ConfigError, match="queue entry 1: it is running: expected a waiting entry: 2"):
            queue.move(1, "down")
        queue.add(DONE, "output/c")
        queue.move(3, "top")
    # It broke off: it was taken before those that were ordered meanwhile.
    assert states(queue) == [(1, "waiting"), (3, "waiting"), (2, "waiting")]
    with pytest.raises(ConfigError, match="queue entry 7: there is none"):
        queue.move(7, "up")
    (queue.folder / "order").write_text("damaged")
    assert [number for number, _ in states(queue)] == [1, 2, 3]


def test_two_processes_that_reorder_lose_nothing(queue: Queue) -> None:
    for number in range(6):
        queue.add(DONE, f"output/{number}")

    def shuffle(own: int) -> None:
        for _ in range(10):
            Queue(queue.folder).move(own, "top")

    threads = [threading.Thread(target=shuffle, args=(own,)) for own in (2, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = [number for number, _ in states(queue)]
    assert sorted(order) == [1, 2, 3, 4, 5, 6]
    assert {*order[:2]} == {2, 5}
    assert order[2:] == [1, 3, 4, 6]


def test_a_number_is_never_given_twice(queue: Queue) -> None:
    queue.add(DONE, "output/one")
    two = queue.add(DONE, "output/two")
    assert queue.remove(two.id) == two
    assert queue.add(DONE, "output/two").id == 3
    (queue.folder / "last").write_text("damaged")
    assert queue.add(DONE, "output/four").id == 4
    with pytest.raises(ConfigError, match=r"queue entry 2: there is none: expected one of 1, 3, 4"):
        queue.remove(2)


def test_many_may_add_at_once(queue: Queue) -> None:
    def add(name: int) -> None:
        for number in range(5):
            Queue(queue.folder).add(DONE, f"output/{name}-{number}")

    threads = [threading.Thread(target=add, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.id for entry in queue.entries()] == list(range(1, 21))


def test_two_that_have_not_ended_may_not_share_a_directory(queue: Queue) -> None:
    queue.add(DONE, "output/one")
    with pytest.raises(ConfigError, match=r"output_dir = output/../output/one belongs to queue entry 1"):
        queue.add(DONE, "output/../output/one")
    queue.work("", say_nothing)
    assert queue.add(DONE, "output/one").id == 2


def test_nor_may_one_go_where_a_run_is_going_on(queue: Queue) -> None:
    run = RunDirectory(queue.workspace / "output" / "one")
    run.create()
    with run.lock(), pytest.raises(ConfigError, match=f"is in use by process {os.getpid()}"):
        queue.add(DONE, "output/one")


def test_files_kept_aside_go_with_the_entry(queue: Queue) -> None:
    def keep(folder: Path) -> list[str]:
        (queue.workspace / folder).mkdir(parents=True)
        (queue.workspace / folder / "config.json").touch()
        return [f"--config={folder}/config.json"]

    entry = queue.add(("--env=cats",), "output/cats", command=keep)
    assert entry.arguments == ("--env=cats",)
    assert entry.command == ("--config=.simpletuner/queue/000001/config.json",)
    assert (queue.folder / "000001" / "config.json").exists()
    queue.remove(entry.id)
    assert not (queue.folder / "000001").exists()


def test_a_worker_takes_them_in_turn_and_goes_on_after_a_failure(queue: Queue) -> None:
    for name, arguments in (("one", DONE), ("two", FAILS), ("three", DONE)):
        queue.add(arguments, f"output/{name}")
    queue.add(DONE, "output/elsewhere", "7")
    said: list[str] = []
    queue.work("", said.append)
    assert states(queue) == [(1, "done"), (2, "failed"), (3, "done"), (4, "waiting")]
    one, two, *_ = queue.entries()
    assert (one.exit_code, one.pid, one.error) == (0, None, None)
    assert one.began is not None
    assert one.ended is not None
    assert two.exit_code == 2
    assert two.error is not None
    assert "--no_such_option: no such option" in two.error
    assert said[0] == "1: output/one begins"
    assert said[3] == "2: output/two failed, exit code 2"
    assert "usage: simpletuner train" in (queue.workspace / "output" / "one" / "console.log").read_text()
    assert queue.work_is_needed() == ["7"]
    assert not list(queue.folder.glob("0*.lock"))


def test_a_second_worker_leaves_it_to_the_first(queue: Queue) -> None:
    queue.add(DONE, "output/one")
    with queue.worker(""):
        queue.work("", say_nothing)
        assert queue.work_is_needed() == []
    assert states(queue) == [(1, "waiting")]


def test_workers_are_started_where_they_are_needed(queue: Queue) -> None:
    queue.add(DONE, "output/one")
    assert queue.start_workers() == [""]
    assert queue.start_workers() == []
    deadline = time.monotonic() + 20
    while states(queue) != [(1, "done")] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states(queue) == [(1, "done")], queue.worker_log("").read_text()
    while queue.worker("").is_held():
        time.sleep(0.02)


def test_a_directory_that_cannot_be_made_fails_and_the_next_is_taken(queue: Queue) -> None:
    (queue.workspace / "file").touch()
    queue.add(DONE, "file")
    queue.add(DONE, "output/two")
    queue.work("", say_nothing)
    assert states(queue) == [(1, "failed"), (2, "done")]
    assert "cannot create" in (queue.entries()[0].error or "")


def test_a_damaged_entry_says_so_and_is_passed_over(queue: Queue) -> None:
    queue.add(DONE, "output/one")
    (queue.folder / "000002.json").write_text('{"id": 2, "sta')
    (queue.folder / "000003.json").write_text("[]")
    (queue.folder / "000004.json").write_text(json.dumps({"id": 4}))
    queue.work("", say_nothing)
    assert states(queue) == [(1, "done"), (2, "failed"), (3, "failed"), (4, "failed")]
    assert "000002.json cannot be read" in (queue.entries()[1].error or "")
    queue.remove(2)
    assert [entry.id for entry in queue.entries()] == [1, 3, 4]


def test_what_was_running_when_the_machine_went_off_waits_again(queue: Queue) -> None:
    pretend_running(queue, queue.add(DONE, "output/one"))
    assert states(queue) == [(1, "waiting")]
    assert queue.work_is_needed() == [""]
    queue.work("", say_nothing)
    assert states(queue) == [(1, "done")]


def test_a_running_entry_stays(queue: Queue) -> None:
    entry = queue.add(DONE, "output/one")
    pretend_running(queue, entry)
    process = held_for(queue.process_lock(entry.id).path, 30)
    try:
        assert states(queue) == [(1, "running")]
        with pytest.raises(ConfigError, match=r"entry 1 is running.*`simpletuner run stop output/one`"):
            queue.remove(1)
    finally:
        process.kill()
        process.communicate()
    assert queue.remove(1).state == "waiting"


@pytest.mark.parametrize(("reason", "code", "state"), [("done", 0, "done"), ("error", 5, "failed")])
def test_a_run_that_outlives_its_worker_is_waited_for(queue: Queue, reason: str, code: int, state: str) -> None:
    entry = queue.add(FAILS, "output/one")
    pretend_running(queue, entry)
    run = RunDirectory(queue.workspace / "output" / "one")
    run.create()
    process = held_for(queue.process_lock(entry.id).path, 0.5)
    with EventLog(run.events) as log:
        if reason == "error":
            log.emit(ErrorEvent(exit_code=code, text="too large"))
        log.emit(EndEvent.model_validate({"reason": reason, "exit_code": code, "step": 3, "seconds": 1}))
    said: list[str] = []
    queue.work("", said.append)
    assert process.wait() == 0
    process.communicate()
    (entry,) = queue.entries()
    assert (entry.state, entry.exit_code, entry.error) == (state, code, "too large" if reason == "error" else None)
    assert said == ["1: output/one still runs without its worker; waiting for it"]


def test_no_entry_is_left_where_the_disk_is_full(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.add(DONE, "output/one")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskError):
            queue.add(DONE, "output/two")
    assert states(queue) == [(1, "waiting")]


def test_how_a_run_ended_is_written_when_there_is_room_again(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.add(DONE, "output/one")
    queue.add(DONE, "output/two")
    monkeypatch.setattr("simpletuner.runs.queue._DISK_FULL_EVERY_S", 0.01)
    sync, said, is_full = os.fsync, list[str](), False

    def fsync(file: int) -> None:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    def say(text: str) -> None:
        nonlocal is_full
        is_full = text == "1: output/one begins" or (is_full and len(said) < 3)
        said.append(text)

    monkeypatch.setattr(os, "fsync", fsync)
    queue.work("", say)
    assert states(queue) == [(1, "done"), (2, "done")]
    assert "No space left on device" in said[1]


def test_devices_are_a_list(queue: Queue) -> None:
    with pytest.raises(ConfigError, match=r"--devices = '0; rm'"):
        queue.add(DONE, "output/one", "0; rm")
    assert queue.worker("GPU-1/2").path.name == "worker-GPU-1_2.lock"
