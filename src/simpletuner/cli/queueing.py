"""`simpletuner run queue list|add|remove|move|resume`: manage a queue of runs, which train one after the other."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from simpletuner.base.console import output_failures_ignored, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.cli.arguments import Flag, Positional, parse_command, refuse_extra, verb_of
from simpletuner.cli.config_copy import config_copier, one_word_flags
from simpletuner.cli.loading import load_here
from simpletuner.cli.printing import json_text, table
from simpletuner.cli.run_text import local_time
from simpletuner.config.values import join_names
from simpletuner.runs.launch import devices_of
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.queue import Queue, QueueEntry, QueueMove
from simpletuner.runs.status import status_of

DEVICES_HELP = """accelerators to train on, such as 0 or 0,1; by default CUDA_VISIBLE_DEVICES, or all. The queue trains
one run at a time for each such list"""


@dataclass(frozen=True)
class QueueCommand:
    """Arguments of `simpletuner run queue VERB`."""

    id: str = Positional(verbs=("remove", "move")).default("")
    to: str = Positional(verbs=("move",)).default("")
    devices: str | None = Flag(DEVICES_HELP, "LIST", verbs=("add", "work")).default(None)
    json: bool = Flag("print one JSON object").default(False)
    train_options: tuple[str, ...] = ()


FORMS = dict.fromkeys(("list", "add", "remove", "move", "resume"), QueueCommand)
"""The arguments of each verb."""


def run(arguments: Sequence[str]) -> int:
    """Execute the verb; without one, list the queue.

    Raises:
        ConfigError: a mistake in the configuration or in the arguments, or an entry that cannot be removed.
        DiskError: the disk is full.
    """
    has_verb = bool(arguments) and not arguments[0].startswith("--")
    verb, *typed = arguments if has_verb else ("list", *arguments)
    verb_of("run queue", [verb], (*FORMS, "work"), join_names(FORMS))
    command = parse_command(QueueCommand, typed, verb)
    if verb == "add":
        return add(command.train_options, command.devices, as_json=command.json)
    refuse_extra(command.train_options, f"simpletuner run queue {verb}")
    queue = Queue.of(Path.cwd())
    if verb == "work":
        with output_failures_ignored():
            queue.work(devices_of(command.devices), say=_log)
        return 0
    if verb == "remove":
        return _remove(queue, command)
    if verb == "move":
        return _move(queue, command)
    if verb == "resume":
        queue.start_workers()
    return _list(queue, command)


def add(arguments: Sequence[str], typed_devices: str | None, *, as_json: bool) -> int:
    """Append the run that the `arguments` of `train` describe to the queue, and start a worker if none runs."""
    loaded = load_here(arguments)
    output_dir, devices = loaded.config.output_dir, devices_of(typed_devices)
    queue = Queue.of(Path.cwd())
    entry = queue.add(one_word_flags(arguments), output_dir, devices, command=config_copier(loaded))
    queue.start_workers()
    now = next((each for each in queue.entries() if each.id == entry.id), entry)
    if as_json:
        say(json_text(now.model_dump(mode="json") | {"notices": list(loaded.notices)}))
        return 0
    for notice in loaded.notices:
        say(f"Note: {notice}")
    pending = [e.id for e in queue.entries() if e.state in ("waiting", "running") and e.devices == devices]
    earlier = pending[: pending.index(now.id)] if now.id in pending else []
    start = f"after {len(earlier)} earlier {'entry' if len(earlier) == 1 else 'entries'}" if earlier else "now"
    say(f"Queue entry {now.id}: {output_dir} starts {start}, with the current configuration.")
    return 0


def _remove(queue: Queue, command: QueueCommand) -> int:
    if not command.id.isdecimal():
        raise ConfigError.of("simpletuner run queue remove: no entry is named", "its number, from `run queue list`")
    entry = queue.remove(int(command.id))
    if command.json:
        say(json_text(entry.model_dump(mode="json")))
    else:
        say(f"Queue entry {entry.id}, {entry.output_dir or 'damaged'}, is removed.")
    return 0


def _move(queue: Queue, command: QueueCommand) -> int:
    word = command.to
    to: QueueMove | int | None = next((way for way in get_args(QueueMove) if way == word), None)
    if to is None and word.isdecimal() and int(word) > 0:
        to = int(word)
    problems = []
    if not command.id.isdecimal():
        problems.append(Problem("simpletuner run queue move: no entry is named", "its number, from `run queue list`"))
    if to is None:
        found = f"simpletuner run queue move: {word} is not understood" if word else "no position is given"
        problems.append(Problem(found, "up, down, top, or a position counted from 1"))
    ConfigError.raise_if(problems)
    assert to is not None
    queue.move(int(command.id), to)
    return _list(queue, command)


def _list(queue: Queue, command: QueueCommand) -> int:
    entries, idle_devices = queue.entries(), queue.work_is_needed() if queue.folder.is_dir() else []
    if command.json:
        fields = [entry.model_dump(mode="json") for entry in entries]
        say(json_text({"entries": fields, "devices_without_a_worker": idle_devices}))
        return 0
    if not entries:
        say("The queue is empty. `simpletuner run queue add` adds a run.")
        return 0
    say(table([("id", "state", "run", "devices", "since", ""), *map(_row, entries)]))
    if idle_devices:
        say("No process works on the waiting runs: `simpletuner run queue resume` starts one.")
    return 0


def _row(entry: QueueEntry) -> tuple[str, ...]:
    since = entry.ended or entry.began or entry.added
    remark = (entry.error or "").partition("\n")[0]
    if entry.state == "running":
        status = status_of(RunDirectory(Path(entry.output_dir)))
        remark = f"step {status.step}" + (f" of {status.steps}" if status.steps else "")
    when = local_time(since) if since else ""
    return str(entry.id), entry.state, entry.output_dir, entry.devices or "all", when, remark


def _log(text: str) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    say(f"{now} {text}")
