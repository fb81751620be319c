"""`simpletuner checkpoint list|verify|delete`: the checkpoints of a run."""

import datetime
from dataclasses import dataclass
from typing import Any

from simpletuner.base.commandline import command_text
from simpletuner.base.console import say
from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.base.sizes import format_size
from simpletuner.cli.arguments import Flag, parse_command, verb_of
from simpletuner.cli.named_run import NamedRun, confirm_deletion
from simpletuner.cli.printing import json_text, table
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import RunDirectory

USAGE = """usage: simpletuner checkpoint list [RUN] [--json]
       simpletuner checkpoint verify [RUN] [--step N[,N…] | --all] [--json]
       simpletuner checkpoint delete [RUN] --step N[,N…] | --all [--yes] [--json]

  list      steps, sizes and times
  verify    read every file and hold it against the hashes of its checkpoint; exit code 6 if one is damaged
  delete    remove checkpoints. The newest one that verifies, from which the run goes on, is kept, unless its step is
            named together with --yes. What the run ended with is no checkpoint: it stays

  RUN is a run's directory. Left out, it is the output_dir of the configuration found here, or of that of --env NAME.
"""


def _steps(text: str) -> tuple[int, ...]:
    """Steps divided by commas.

    Raises:
        ConfigError: something else.
    """
    words = text.split(",")
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError.of(f"--step = {wrong[0]!r}", "a whole number, or several divided by commas")
    return tuple(map(int, words))


@dataclass(frozen=True)
class CheckpointCommand(NamedRun):
    """What is typed after `simpletuner checkpoint` and its verb."""

    step: tuple[tuple[int, ...], ...] = Flag(
        "this one; several are divided by commas, or --step is given again",
        "N",
        convert=_steps,
        is_repeatable=True,
        verbs=("verify", "delete"),
    ).default(())
    all: bool = Flag("all of them (verify does so by itself)", verbs=("verify", "delete")).default(False)
    yes: bool = Flag("do not ask", verbs=("delete",)).default(False)
    json: bool = Flag("print one JSON object").default(False)


FORMS = dict.fromkeys(("list", "verify", "delete"), CheckpointCommand)
"""What is typed after each verb."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """One that lies on the disk."""

    step: int
    path: str
    bytes: int
    time: str
    """UTC, ISO 8601."""


def run(arguments: list[str]) -> int:
    """List, verify or delete. Returns 6 where one that was verified is damaged.

    Raises:
        ConfigError: a mistake in what was typed.
        CheckpointError: no such checkpoint, one that must stay, or the run is going on.
    """
    works = {"list": _list, "verify": _verify, "delete": _delete}
    verb = verb_of("checkpoint", arguments, works)
    command = parse_command(CheckpointCommand, arguments[1:], verb)
    return works[verb](command.directory(f"simpletuner checkpoint {verb}"), command)


def _list(directory: RunDirectory, command: CheckpointCommand) -> int:
    there = [one for step in checkpoints.steps(directory) if (one := _at(directory, step)) is not None]
    if command.json:
        say(_json(directory, "checkpoints", [one.__dict__ for one in there]))
    elif not there:
        say(f"{directory.root} has no checkpoints.")
    else:
        rows = [(str(one.step), format_size(one.bytes), _local(one.time), one.path) for one in there]
        say(table([("step", "size", "time", "folder"), *rows]))
        say(f"{len(there)} checkpoints, {format_size(sum(one.bytes for one in there))}")
    return 0


def _verify(directory: RunDirectory, command: CheckpointCommand) -> int:
    steps = _asked(directory, command.step) or checkpoints.steps(directory)
    told: list[dict[str, Any]] = []
    for step in steps:
        damage = checkpoints.damage(directory.checkpoint(step))
        one = _at(directory, step)
        if one is None:
            continue
        told.append(one.__dict__ | {"damage": damage})
        if not command.json:
            say(f"step {step}: {'good' if damage is None else f'damaged: {damage}'}")
    if command.json:
        say(_json(directory, "checkpoints", told))
    elif not steps:
        say(f"{directory.root} has no checkpoints.")
    return CheckpointError.exit_code if any(one["damage"] for one in told) else 0


def _delete(directory: RunDirectory, command: CheckpointCommand) -> int:
    if bool(command.step) == command.all:
        raise ConfigError.of("simpletuner checkpoint delete: which is not said", "either --step N or --all")
    named = _asked(directory, command.step)
    if directory.lock().is_held():
        raise CheckpointError.of(
            f"{directory.root} is being trained by process {directory.lock().pid() or 'unknown'}, which may need them",
            "a run that is at rest",
            f"`{command_text('simpletuner', 'run', 'stop', directory.root, '--wait')}` saves and ends it.",
        )
    with directory.lock():
        good = next((one.step for one in checkpoints.newest_first(directory) if one.damage is None), None)
        doomed = named or [step for step in checkpoints.steps(directory) if step != good]
        if good in doomed and not command.yes:
            raise CheckpointError.of(
                f"step {good} is the newest checkpoint of {directory.root} that verifies: the run goes on from it",
                "another one",
                "With --yes it is deleted all the same.",
            )
        gone = [one for step in doomed if (one := _at(directory, step)) is not None]
        if gone and not command.yes:
            steps = ", ".join(str(one.step) for one in gone)
            what = f"the checkpoints of steps {steps}" if len(gone) > 1 else f"the checkpoint of step {steps}"
            confirm_deletion(what, format_size(sum(one.bytes for one in gone)))
        for step in doomed:
            checkpoints.remove(directory, step)
    kept = checkpoints.steps(directory)
    if command.json:
        say(_json(directory, "deleted", [one.__dict__ for one in gone], kept=kept))
    else:
        say(f"{len(gone)} deleted, {format_size(sum(one.bytes for one in gone))}; {len(kept)} kept.")
    return 0


def _asked(directory: RunDirectory, typed: tuple[tuple[int, ...], ...]) -> list[int]:
    """The steps of each --step, each once.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    there = checkpoints.steps(directory)
    known = f"one of {', '.join(map(str, there))}" if there else ""
    steps = list(dict.fromkeys(step for steps in typed for step in steps))
    CheckpointError.raise_if(
        Problem(f"{directory.root} has no checkpoint of step {step}", known) for step in steps if step not in there
    )
    return steps


def _at(directory: RunDirectory, step: int) -> ListedCheckpoint | None:
    """A checkpoint; None where the run has pruned it since it was looked for."""
    folder = directory.checkpoint(step)
    try:
        changed = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
        return ListedCheckpoint(step, str(folder), checkpoints.size(folder), changed.isoformat(timespec="seconds"))
    except FileNotFoundError:
        return None


def _local(time: str) -> str:
    return datetime.datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")


def _json(directory: RunDirectory, key: str, told: list[dict[str, Any]], **more: object) -> str:
    return json_text({"run": str(directory.root), key: told} | more)
