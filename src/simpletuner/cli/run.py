"""`simpletuner run start|stop|save|validate|show|list|queue`: runs that go on by themselves, and how to look after
them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from simpletuner.base.commandline import command_text
from simpletuner.base.console import complain, say
from simpletuner.base.errors import CheckpointError, ConfigError
from simpletuner.cli import queueing
from simpletuner.cli.arguments import Flag, Positional, flag_help, parse_command, refuse_rest, verb_of, wants_help
from simpletuner.cli.loading import load_here
from simpletuner.cli.main import INTERRUPTED
from simpletuner.cli.named_run import RUNS, NamedRun
from simpletuner.cli.printing import json_text, table
from simpletuner.cli.telling import POLL_EVENTS_EVERY_S, Narrator, as_json, described, followed, shown_time
from simpletuner.runs.events import TITLES
from simpletuner.runs.launch import launch_run
from simpletuner.runs.layout import RunDirectory
from simpletuner.runs.process import ControlRequest, ask
from simpletuner.runs.status import RunStatus, find_runs, status_of

_USAGE = """usage: simpletuner run start [--queue] [--devices LIST] [--json] [options of `simpletuner train`]
       simpletuner run stop|save|validate [RUN] [--wait] [--json]
       simpletuner run show [RUN] [--follow] [--json]
       simpletuner run list [FOLDER] [--json]
       simpletuner run queue [list | add | remove ID | resume] [--devices LIST] [--json] [options of `train`]

  start      train, apart from this terminal: it goes on when you log out. What it prints is in RUN/console.log
  stop       finish the step, save, and end; the same `start` goes on from there
  save       write a checkpoint after this step
  validate   make the validation pictures after this step
  show       where a run stands; with --follow, what it does, until it ends. Ctrl-C leaves the run alone
  list       the runs below FOLDER, by default output, the newest first
  queue      runs that are trained one after the other. `add` puts one at the end, with the configuration as it is
             now; `remove` takes one out; `resume` goes on after the machine was switched off or a disk was full

  RUN is a run's directory. Left out, it is the output_dir of the configuration found here, or of that of --env NAME,
  --config PATH or --example NAME.
"""

REQUESTS: tuple[ControlRequest, ...] = get_args(ControlRequest)
VERBS = ("start", *REQUESTS, "show", "list", "queue")

_SHOW = ("simpletuner", "run", "show")
_JSON_HELP = "print one JSON object (with --follow, one event a line)"


@dataclass(frozen=True)
class StartCommand:
    """What is typed after `simpletuner run start`."""

    queue: bool = Flag("as `queue add`").default(False)
    devices: str | None = Flag(queueing.DEVICES_HELP, "LIST").default(None)
    json: bool = Flag(_JSON_HELP).default(False)
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListCommand:
    """What is typed after `simpletuner run list`."""

    folder: Path | None = Positional(convert=Path).default(None)
    json: bool = Flag(_JSON_HELP).default(False)
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunCommand(NamedRun):
    """What is typed after the other verbs of `simpletuner run`."""

    follow: bool = Flag(verbs=("show",)).default(False)
    wait: bool = Flag("return when it is done, not when it is asked for", verbs=REQUESTS).default(False)
    json: bool = Flag(_JSON_HELP).default(False)


def run(arguments: list[str]) -> int:
    """Do what the word says.

    Raises:
        ConfigError: a mistake in the configuration or in what was typed.
        CheckpointError: a run is going on that must not be, or none where one must.
        UserError: the run that was started ended at once, or the one that was waited for ended otherwise.
        DiskError: the disk is full.
    """
    if wants_help(arguments):
        say(f"{_USAGE}\n{flag_help(StartCommand, RunCommand)}")
        return 0
    verb = verb_of("run", arguments, VERBS, f"one of {', '.join(VERBS)}")
    typed = arguments[1:]
    if verb == "start":
        return _start(parse_command(StartCommand, typed))
    if verb == "list":
        return _list(parse_command(ListCommand, typed))
    if verb == "show":
        return _show(parse_command(RunCommand, typed, verb))
    if verb == "queue":
        return queueing.run(typed)
    request = next(request for request in REQUESTS if request == verb)
    return _ask(request, parse_command(RunCommand, typed, verb))


def _start(command: StartCommand) -> int:
    if command.queue:
        return queueing.add(command.rest, command.devices, as_json=command.json)
    loaded = load_here(command.rest)
    directory = RunDirectory(Path(loaded.config.output_dir))
    try:
        started = launch_run(command.rest, directory, Path.cwd(), queueing.devices_of(command.devices))
    except KeyboardInterrupt:
        complain(f"\nNot waited for. `{command_text(*_SHOW, directory.root)}` says what became of it.")
        return INTERRUPTED
    if command.json:
        told = {"pid": started.pid, "exit_code": started.exit_code, "notices": list(loaded.notices)}
        say(json_text(as_json(status_of(directory)) | told))
        return 0
    for notice in loaded.notices:
        say(f"Note: {notice}")
    if started.exit_code is not None:
        say(started.printed.rpartition("\n")[2])
        return 0
    say(f"{directory.root} is being trained by process {started.pid}.")
    show, stop = (
        command_text(*_SHOW, directory.root, "--follow"),
        command_text("simpletuner", "run", "stop", directory.root),
    )
    say(f"  {show}   shows what it does")
    say(f"  {stop:<{len(show)}}   saves it and ends it")
    return 0


def _list(command: ListCommand) -> int:
    refuse_rest(command.rest, "simpletuner run list")
    folder = RUNS if command.folder is None else command.folder
    if command.folder is not None and not folder.is_dir():
        raise ConfigError.of(f"{folder}: no such folder", "one with runs below it")
    statuses = sorted(map(status_of, find_runs(folder)), key=lambda status: status.started or "", reverse=True)
    if command.json:
        say(json_text({"runs": [as_json(status) for status in statuses]}))
    elif not statuses:
        say(f"No runs below {folder}. `simpletuner run start` starts one.")
    else:
        rows = [("run", "state", "step", "loss", "began", "doing"), *map(_row, statuses)]
        say(table(rows))
    return 0


def _row(status: RunStatus) -> tuple[str, ...]:
    step = str(status.step) if status.steps is None else f"{status.step}/{status.steps}"
    loss = "" if status.loss is None else f"{status.loss:.4f}"
    doing = TITLES[status.phase] if status.state == "running" and status.phase else ""
    return str(status.root), status.state, step, loss, shown_time(status.started) if status.started else "", doing


def _show(command: RunCommand) -> int:
    directory = command.directory("simpletuner run show")
    place = directory.events.stat().st_size if directory.events.exists() else 0
    status = status_of(directory)
    if not command.follow:
        say(json_text(as_json(status)) if command.json else described(status))
        return 0
    if not command.json:
        say(described(status))
    narrator = Narrator(status.steps)
    try:
        for event in followed(directory, place):
            lines = (json.dumps(event, ensure_ascii=False),) if command.json else narrator.lines(event)
            for line in lines:
                say(line)
    except KeyboardInterrupt:
        complain(f"\n{directory.root} goes on.")
        return INTERRUPTED
    return 0


def _ask(request: ControlRequest, command: RunCommand) -> int:
    directory = command.directory(f"simpletuner run {request}")
    place = directory.events.stat().st_size if directory.events.exists() else 0
    before = status_of(directory)
    ask(directory, request)
    told: dict[str, Any] = {"request": request}
    if command.wait:
        told |= _awaited(directory, request, place)
    if command.json:
        say(json_text(as_json(status_of(directory)) | told))
    elif command.wait:
        say(f"{directory.root}: {told['done']}")
    else:
        say(f"{directory.root}: asked. {_when(request, before)}")
    return 0


def _when(request: ControlRequest, status: RunStatus) -> str:
    if status.phase is None or status.phase in ("train", "validation", "export"):
        after = {"stop": "saves and ends", "save": "saves", "validate": "draws"}[request]
        return f"It {after} when this step is finished."
    doing = f"it is {TITLES[status.phase]}"
    if request == "stop":
        return f"{doing[0].upper()}{doing[1:]}, and ends where it is; what is finished is kept."
    return f"{doing[0].upper()}{doing[1:]}, and obeys after its first step."


def _awaited(directory: RunDirectory, request: ControlRequest, place: int) -> dict[str, Any]:
    """Wait until a request is obeyed; what came of it.

    Raises:
        CheckpointError: the run ended without it.
    """
    steps_after = 0
    for event in followed(directory, place):
        kind = event["type"]
        if request == "stop" and kind == "end":
            while directory.lock().is_held():
                time.sleep(POLL_EVENTS_EVERY_S)
            if event["reason"] == "error":
                break
            return {"done": f"{event['reason']} at step {event['step']}"}
        if request == "save" and kind == "checkpoint" and event["state"] == "saved":
            return {"done": f"saved {directory.root / event['path']}"}
        if request == "validate" and kind == "validation" and event["sheet"] and event["step"] > 0:
            return {"done": f"drew {directory.root / event['sheet']}"}
        # Taken, and no picture came of it two steps later: there are no prompts.
        steps_after += kind == "step" and not (directory.control / request).exists()
        if request == "validate" and steps_after > 1:
            raise ConfigError.of(f"{directory.root} makes no pictures", remedy="It has no prompts, or no validation.")
    raise CheckpointError.of(
        f"{directory.root} ended before it obeyed", remedy=f"`{command_text(*_SHOW, directory.root)}` says how."
    )
