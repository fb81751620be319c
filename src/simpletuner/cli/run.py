"""`simpletuner run start|stop|save|validate|show|list|note|delete|queue`: start runs in the background and manage
them."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from simpletuner.base.commandline import command_text
from simpletuner.base.console import complain, say
from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.base.sizes import format_size
from simpletuner.cli import queueing
from simpletuner.cli.arguments import Flag, Positional, one_of, parse_command, refuse_extra, verb_of
from simpletuner.cli.loading import load_here
from simpletuner.cli.main import INTERRUPTED
from simpletuner.cli.named_run import RUNS, NamedRun, confirm_deletion
from simpletuner.cli.printing import json_text, table
from simpletuner.cli.run_text import (
    POLL_EVENTS_EVERY_S,
    Narrator,
    follow_events,
    local_time,
    status_fields,
    status_text,
)
from simpletuner.config.values import join_names
from simpletuner.runs.events import TITLES
from simpletuner.runs.launch import devices_of, launch_run
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.note import read_note, write_note
from simpletuner.runs.process import ControlRequest, ask
from simpletuner.runs.removal import check_deletable, contents_of, delete_run, finish_deletions
from simpletuner.runs.status import RunState, RunStatus, find_runs, status_of

if TYPE_CHECKING:
    from simpletuner.cli.help import Forms

USAGE = """usage: simpletuner run start [--queue] [--no-wait] [--devices LIST] [--json] [options of `train`]
       simpletuner run stop|save|validate [RUN] [--wait] [--json]
       simpletuner run show [RUN] [--follow] [--json]
       simpletuner run list [FOLDER] [--find TEXT] [--state STATE] [--sort KEY] [--json]
       simpletuner run note RUN [TEXT] [--json]
       simpletuner run delete RUN [--yes] [--json]
       simpletuner run queue [list | remove ID | move ID up|down|top|N | resume] [--json]
       simpletuner run queue add [--devices LIST] [--json] [options of `train`]

  start      train in the background; the run continues when you log out. Its output is in RUN/console.log
  stop       finish the current step, save a checkpoint and end; the same `start` resumes the run
  save       write a checkpoint after the current step
  validate   generate the validation images after the current step
  show       print a run's status; with --follow, print what the run does until it ends. Ctrl-C does not end the run
  list       list the runs in FOLDER, by default output, newest first
  note       print the note of a run; with TEXT, set the note ("" removes it)
  delete     delete a run's directory with all its files, after confirmation; runs that train or wait in the
             queue are not deleted
  queue      train runs one after the other. `add` appends a run with its current configuration, `remove` removes it,
             `move` changes its position, and `resume` continues after the machine was switched off or a disk was full

  RUN is a run's directory. By default it is the output_dir of the configuration in this folder, or of --env NAME,
  --config PATH or --example NAME.
"""

REQUESTS: tuple[ControlRequest, ...] = get_args(ControlRequest)

START_WAIT_S = 30.0

_SHOW = ("simpletuner", "run", "show")
_JSON_HELP = "print one JSON object (with --follow, one event per line)"


@dataclass(frozen=True)
class StartCommand:
    """Arguments of `simpletuner run start`."""

    queue: bool = Flag("add the run to the queue, like `queue add`").default(False)
    no_wait: bool = Flag("return as soon as the process has started, without waiting until training begins").default(
        False
    )
    devices: str | None = Flag(queueing.DEVICES_HELP, "LIST").default(None)
    json: bool = Flag(_JSON_HELP).default(False)
    train_options: tuple[str, ...] = ()


RunOrder = Literal["started", "name", "loss", "state"]
ORDERS: tuple[RunOrder, ...] = get_args(RunOrder)
STATES: tuple[RunState, ...] = get_args(RunState)


@dataclass(frozen=True)
class NoteCommand:
    """Arguments of `simpletuner run note`."""

    run: Path | None = Positional(convert=Path).default(None)
    text: str | None = Positional().default(None)
    json: bool = Flag(_JSON_HELP).default(False)


@dataclass(frozen=True)
class DeleteCommand:
    """Arguments of `simpletuner run delete`."""

    run: Path | None = Positional(convert=Path).default(None)
    yes: bool = Flag("delete without confirmation").default(False)
    json: bool = Flag(_JSON_HELP).default(False)


@dataclass(frozen=True)
class ListCommand:
    """Arguments of `simpletuner run list`."""

    folder: Path | None = Positional(convert=Path).default(None)
    find: str = Flag("only runs with this text in their name, folder or note", "TEXT").default("")
    state: RunState | None = Flag(
        "only runs in this state", "STATE", convert=one_of(STATES), expects=join_names(STATES)
    ).default(None)
    sort: RunOrder = Flag(
        "sort by started (newest first), name, loss or state", "KEY", convert=one_of(ORDERS), expects=join_names(ORDERS)
    ).default("started")
    json: bool = Flag(_JSON_HELP).default(False)
    train_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunCommand(NamedRun):
    """Arguments of `simpletuner run stop|save|validate|show`."""

    follow: bool = Flag("print what the run does, until it ends", verbs=("show",)).default(False)
    wait: bool = Flag("wait until the run has executed the request", verbs=REQUESTS).default(False)
    json: bool = Flag(_JSON_HELP).default(False)


FORMS: "Forms" = {
    "start": StartCommand,
    **dict.fromkeys((*REQUESTS, "show"), RunCommand),
    "list": ListCommand,
    "note": NoteCommand,
    "delete": DeleteCommand,
    "queue": queueing.FORMS,
}
"""The arguments of each verb."""


def run(arguments: list[str]) -> int:
    """Execute the verb.

    Raises:
        ConfigError: a mistake in the configuration or in the arguments.
        CheckpointError: the verb does not apply to a run that is being trained, or only to one that is.
        UserError: the run ended right after its start, or before it executed the awaited request.
        DiskError: the disk is full.
    """
    verb = verb_of("run", arguments, FORMS, f"one of {', '.join(FORMS)}")
    typed = arguments[1:]
    if verb == "start":
        return _start(parse_command(StartCommand, typed))
    if verb == "list":
        return _list(parse_command(ListCommand, typed))
    if verb == "note":
        return _note(parse_command(NoteCommand, typed))
    if verb == "delete":
        return _delete(parse_command(DeleteCommand, typed))
    if verb == "show":
        return _show(parse_command(RunCommand, typed, verb))
    if verb == "queue":
        return queueing.run(typed)
    request = next(request for request in REQUESTS if request == verb)
    return _send_request(request, parse_command(RunCommand, typed, verb))


def _start(command: StartCommand) -> int:
    if command.queue:
        return queueing.add(command.train_options, command.devices, as_json=command.json)
    loaded = load_here(command.train_options)
    directory = RunDirectory(Path(loaded.config.output_dir))
    try:
        wait_s = 0.0 if command.no_wait else START_WAIT_S
        started = launch_run(command.train_options, directory, Path.cwd(), devices_of(command.devices), wait_s=wait_s)
    except KeyboardInterrupt:
        complain(f"\nStopped waiting for the start. `{command_text(*_SHOW, directory.root)}` prints the run's status.")
        return INTERRUPTED
    if command.json:
        fields = {"pid": started.pid, "exit_code": started.exit_code, "notices": list(loaded.notices)}
        say(json_text(status_fields(status_of(directory)) | fields))
        return 0
    for notice in loaded.notices:
        say(f"Note: {notice}")
    if started.exit_code is not None:
        say(started.printed.rpartition("\n")[2])
        return 0
    activity = "starting in" if command.no_wait else "being trained by"
    say(f"{directory.root} is {activity} process {started.pid}.")
    show, stop = (
        command_text(*_SHOW, directory.root, "--follow"),
        command_text("simpletuner", "run", "stop", directory.root),
    )
    say(f"  {show}   prints its progress")
    say(f"  {stop:<{len(show)}}   saves and ends it")
    return 0


def _list(command: ListCommand) -> int:
    refuse_extra(command.train_options, "simpletuner run list")
    folder = RUNS if command.folder is None else command.folder
    if command.folder is not None and not folder.is_dir():
        raise ConfigError.of(f"{folder}: no such folder", "a folder that contains runs")
    finish_deletions(folder)
    matching = [status for status in map(status_of, find_runs(folder)) if _matches(status, command)]
    statuses = _sorted(matching, command.sort)
    if command.json:
        say(json_text({"runs": [status_fields(status) for status in statuses]}))
    elif not statuses and (command.find or command.state):
        say(f"No matching runs in {folder}.")
    elif not statuses:
        say(f"No runs in {folder}. `simpletuner run start` starts one.")
    else:
        rows = [("run", "state", "step", "step's loss", "started", "phase", "note"), *map(_row, statuses)]
        has_notes = any(row[-1] for row in rows[1:])
        say(table(rows if has_notes else [row[:-1] for row in rows]))
    return 0


def _matches(status: RunStatus, command: ListCommand) -> bool:
    text = f"{status.root} {status.note}".casefold()
    return command.find.casefold() in text and command.state in (None, status.state)


def _sorted(statuses: Sequence[RunStatus], order: RunOrder) -> list[RunStatus]:
    """`statuses` in `order`: ascending by name, loss or state, then newest first."""
    newest = sorted(statuses, key=lambda status: status.started or "", reverse=True)
    keys: dict[RunOrder, Callable[[RunStatus], Any]] = {
        "started": lambda _: 0,
        "name": lambda status: status.root.name,
        "loss": lambda status: math.inf if status.loss is None or math.isnan(status.loss) else status.loss,
        "state": lambda status: status.state,
    }
    return sorted(newest, key=keys[order])


def _note(command: NoteCommand) -> int:
    directory = NamedRun(command.run).directory("simpletuner run note")
    if command.text is not None:
        write_note(directory, command.text)
    note = read_note(directory)
    if command.json:
        say(json_text({"run": str(directory.root), "note": note}))
    elif note or command.text is None:
        say(note or f"{directory.root} has no note.")
    else:
        say(f"The note of {directory.root} is removed.")
    return 0


def _delete(command: DeleteCommand) -> int:
    if command.run is None:
        raise ConfigError.of("simpletuner run delete: no run is named", "its directory")
    directory = RunDirectory(command.run)
    check_deletable(directory, Path.cwd())
    if not command.yes:
        contents = contents_of(directory)
        confirm_deletion(str(directory.root), f"{format_size(contents.bytes)}: {contents.text}")
    deleted = delete_run(directory, Path.cwd())
    if command.json:
        say(json_text({"run": str(directory.root), "bytes": deleted.bytes, "files": deleted.files}))
    else:
        say(f"{directory.root} is deleted: {format_size(deleted.bytes)}, {deleted.text}.")
    return 0


def _row(status: RunStatus) -> tuple[str, ...]:
    step = str(status.step) if status.steps is None else f"{status.step}/{status.steps}"
    loss = "" if status.loss is None else f"{status.loss:.4f}"
    phase = TITLES[status.phase] if status.state == "running" and status.phase else ""
    started = local_time(status.started) if status.started else ""
    return str(status.root), status.state, step, loss, started, phase, " ".join(status.note.split())[:40]


def _show(command: RunCommand) -> int:
    directory = command.directory("simpletuner run show")
    offset = directory.events.stat().st_size if directory.events.exists() else 0
    status = status_of(directory)
    if not command.follow:
        say(json_text(status_fields(status)) if command.json else status_text(status))
        return 0
    if not command.json:
        say(status_text(status))
    narrator = Narrator(status.steps)
    try:
        for event in follow_events(directory, offset):
            lines = (json.dumps(event, ensure_ascii=False),) if command.json else narrator.lines(event)
            for line in lines:
                say(line)
    except KeyboardInterrupt:
        complain(f"\n{directory.root} continues.")
        return INTERRUPTED
    return 0


def _send_request(request: ControlRequest, command: RunCommand) -> int:
    directory = command.directory(f"simpletuner run {request}")
    offset = directory.events.stat().st_size if directory.events.exists() else 0
    before = status_of(directory)
    ask(directory, request)
    fields: dict[str, Any] = {"request": request}
    if command.wait:
        fields |= _await_result(directory, request, offset)
    if command.json:
        say(json_text(status_fields(status_of(directory)) | fields))
    elif command.wait:
        say(f"{directory.root}: {fields['done']}")
    else:
        say(f"{directory.root}: requested. {_expected_effect(request, before)}")
    return 0


def _expected_effect(request: ControlRequest, status: RunStatus) -> str:
    """When and how the run will execute the request."""
    if status.state == "starting":
        return "The run ends before training begins."
    if status.phase is None or status.phase in ("train", "validation", "export"):
        action = {"stop": "saves and ends", "save": "saves", "validate": "generates images"}[request]
        return f"The run {action} when this step is finished."
    phase = f"The run is {TITLES[status.phase]}"
    if request == "stop":
        return f"{phase} and ends at once; finished work is kept."
    return f"{phase}; it executes the request after the first step."


def _await_result(directory: RunDirectory, request: ControlRequest, offset: int) -> dict[str, Any]:
    """Wait until the run has executed `request`, and return the result. `offset` is the size of the events before it.

    Raises:
        CheckpointError: the run ended before it executed the request.
    """
    steps_after = 0
    for event in follow_events(directory, offset):
        kind = event["type"]
        if request == "stop" and kind == "end":
            # The launcher holds the starting lock and ends after the run.
            while directory.lock().is_held() or directory.starting_lock().is_held():
                time.sleep(POLL_EVENTS_EVERY_S)
            if event["reason"] == "error":
                break
            return {"done": f"{event['reason']} at step {event['step']}"}
        if request == "save" and kind == "checkpoint" and event["state"] == "saved":
            return {"done": f"saved {directory.root / event['path']}"}
        if request == "validate" and kind == "validation" and event["sheet"] and event["step"] > 0:
            return {"done": f"generated {directory.root / event['sheet']}"}
        # If there are no images two steps after the run took the request, it has no prompts.
        steps_after += kind == "step" and not (directory.control / request).exists()
        if request == "validate" and steps_after > 1:
            raise ConfigError.of(
                f"{directory.root} generates no validation images", remedy="It has no prompts, or no validation."
            )
    if request == "stop" and status_of(directory).state == "stopped":
        return {"done": "stopped before it began"}
    raise CheckpointError.of(
        f"{directory.root} ended before it executed the request",
        remedy=f"`{command_text(*_SHOW, directory.root)}` shows how it ended.",
    )
