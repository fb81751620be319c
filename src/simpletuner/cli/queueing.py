"""`simpletuner run queue list|add|remove|resume`: runs that wait for their turn."""

import contextlib
import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from simpletuner.base.errors import ConfigError
from simpletuner.cli.kept import kept_aside, spelled
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import json_text, table
from simpletuner.cli.telling import shown_time
from simpletuner.cli.typed import Typed, typed
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Entry, Queue
from simpletuner.runs.status import status_of

WORDS = ("list", "add", "remove", "resume", "work")
NO_DEVICE = "-1"
"""For CUDA_VISIBLE_DEVICES: none of them."""


def run(arguments: Sequence[str]) -> int:
    """Do what the word says; without one, list.

    Raises:
        ConfigError: a mistake in the configuration or in what was typed, or an entry that cannot be removed.
        DiskError: the disk is full.
    """
    has_word = bool(arguments) and not arguments[0].startswith("--")
    word = arguments[0] if has_word else "list"
    if word not in WORDS:
        raise ConfigError.of(f"simpletuner run queue {word}: nothing to do", "list, add, remove or resume")
    found = typed(
        arguments[1:] if has_word else arguments,
        switches=("json",),
        values=("devices",) if word in ("add", "work") else (),
    )
    if word == "add":
        return add(found)
    what = f"simpletuner run queue {word}"
    found.nothing_else(what, words=1 if word == "remove" else 0)
    queue = Queue.of(Path.cwd())
    if word == "work":
        queue.work(devices_of(found), say=_log)
        return 0
    if word == "remove":
        return _remove(queue, found)
    if word == "resume":
        queue.start_workers()
    return _list(queue, found)


def add(found: Typed) -> int:
    """Put the run that was typed at the end of the queue, and see to it that someone works on it."""
    arguments = [*found.words, *found.rest]
    loaded = load_here(arguments)
    output_dir, devices = loaded.config.output_dir, devices_of(found)
    queue = Queue.of(Path.cwd())
    entry = queue.add(spelled(arguments), output_dir, devices, command=kept_aside(arguments, loaded))
    queue.start_workers()
    now = next((other for other in queue.entries() if other.id == entry.id), entry)
    if "json" in found.switches:
        print(json_text(now.model_dump(mode="json") | {"notices": list(loaded.notices)}))
        return 0
    for notice in loaded.notices:
        print(f"Note: {notice}")
    others = [
        e for e in queue.entries() if e.state in ("waiting", "running") and e.devices == devices and e.id < now.id
    ]
    turn = f"when {len(others)} before it have ended" if others else "now"
    print(f"Queue entry {now.id}: {output_dir} is trained {turn}, with the configuration as it is.")
    return 0


def devices_of(found: Typed) -> str:
    """The devices that were typed, or those that the environment leaves; "" for what the machine has."""
    if "devices" in found.values:
        return found.values["devices"][-1]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else visible or NO_DEVICE


def _remove(queue: Queue, found: Typed) -> int:
    if not found.words or not found.words[0].isdecimal():
        raise ConfigError.of("simpletuner run queue remove: no entry is named", "its number, from `run queue list`")
    entry = queue.remove(int(found.words[0]))
    if "json" in found.switches:
        print(json_text(entry.model_dump(mode="json")))
    else:
        print(f"Queue entry {entry.id}, {entry.output_dir or 'damaged'}, is taken out.")
    return 0


def _list(queue: Queue, found: Typed) -> int:
    entries, idle = queue.entries(), queue.work_is_needed() if queue.folder.is_dir() else []
    if "json" in found.switches:
        told = [entry.model_dump(mode="json") for entry in entries]
        print(json_text({"entries": told, "devices_without_a_worker": idle}))
        return 0
    if not entries:
        print("Nothing is in the queue. `simpletuner run queue add` puts a run there.")
        return 0
    print(table([("id", "state", "run", "devices", "since", ""), *map(_row, entries)]))
    if idle:
        print("Nothing works on what waits: `simpletuner run queue resume` goes on.")
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    since = entry.ended or entry.began or entry.added
    remark = (entry.error or "").partition("\n")[0]
    if entry.state == "running":
        status = status_of(RunDirectory(Path(entry.output_dir)))
        remark = f"step {status.step}" + (f" of {status.steps}" if status.steps else "")
    when = shown_time(since) if since else ""
    return str(entry.id), entry.state, entry.output_dir, entry.devices or "all", when, remark


def _log(text: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk must not end the work
        print(f"{now} {text}", flush=True)
