"""`simpletuner checkpoint list|verify|delete`: manage the checkpoints of a run."""

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

  list      list the checkpoints with their steps, sizes and times
  verify    read every file and compare it with the checkpoint's hashes; exit code 6 if one is damaged
  delete    delete checkpoints. The run resumes from the newest checkpoint that verifies. That one is kept, unless you
            name its step and give --yes. The finished LoRA or model is not a checkpoint and is never deleted

  RUN is a run's directory. By default it is the output_dir of the configuration in this folder or of --env NAME.
"""


def _steps(text: str) -> tuple[int, ...]:
    """Parse steps that are separated by commas.

    Raises:
        ConfigError: a step is not a whole number.
    """
    words = text.split(",")
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError.of(f"--step = {wrong[0]!r}", "a whole number, or several separated by commas")
    return tuple(map(int, words))


@dataclass(frozen=True)
class CheckpointCommand(NamedRun):
    """Arguments of `simpletuner checkpoint VERB`."""

    step: tuple[tuple[int, ...], ...] = Flag(
        "a checkpoint's step; separate several by commas, or repeat --step",
        "N",
        convert=_steps,
        is_repeatable=True,
        verbs=("verify", "delete"),
    ).default(())
    all: bool = Flag("all checkpoints (the default of verify)", verbs=("verify", "delete")).default(False)
    yes: bool = Flag("delete without confirmation", verbs=("delete",)).default(False)
    json: bool = Flag("print one JSON object").default(False)


FORMS = dict.fromkeys(("list", "verify", "delete"), CheckpointCommand)
"""The arguments of each verb."""


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint on disk, with the fields of its JSON object."""

    step: int
    path: str
    bytes: int
    time: str
    """UTC, ISO 8601."""


def run(arguments: list[str]) -> int:
    """List, verify or delete checkpoints. Returns 6 if a verified checkpoint is damaged.

    Raises:
        ConfigError: a mistake in the arguments.
        CheckpointError: there is no such checkpoint, deleting it needs --yes, or the run is being trained.
    """
    actions = {"list": _list, "verify": _verify, "delete": _delete}
    verb = verb_of("checkpoint", arguments, actions)
    command = parse_command(CheckpointCommand, arguments[1:], verb)
    return actions[verb](command.directory(f"simpletuner checkpoint {verb}"), command)


def _list(directory: RunDirectory, command: CheckpointCommand) -> int:
    listed = [each for step in checkpoints.steps(directory) if (each := _listed(directory, step)) is not None]
    if command.json:
        say(_json(directory, "checkpoints", [each.__dict__ for each in listed]))
    elif not listed:
        say(f"{directory.root} has no checkpoints.")
    else:
        rows = [(str(each.step), format_size(each.bytes), _local(each.time), each.path) for each in listed]
        say(table([("step", "size", "time", "folder"), *rows]))
        say(f"{len(listed)} checkpoints, {format_size(sum(each.bytes for each in listed))}")
    return 0


def _verify(directory: RunDirectory, command: CheckpointCommand) -> int:
    steps = _typed_steps(directory, command.step) or checkpoints.steps(directory)
    verified: list[dict[str, Any]] = []
    for step in steps:
        damage = checkpoints.damage(directory.checkpoint(step))
        checkpoint = _listed(directory, step)
        if checkpoint is None:
            continue
        verified.append(checkpoint.__dict__ | {"damage": damage})
        if not command.json:
            say(f"step {step}: {'good' if damage is None else f'damaged: {damage}'}")
    if command.json:
        say(_json(directory, "checkpoints", verified))
    elif not steps:
        say(f"{directory.root} has no checkpoints.")
    return CheckpointError.exit_code if any(each["damage"] for each in verified) else 0


def _delete(directory: RunDirectory, command: CheckpointCommand) -> int:
    if bool(command.step) == command.all:
        raise ConfigError.of("simpletuner checkpoint delete: no checkpoint is named", "either --step N or --all")
    named = _typed_steps(directory, command.step)
    if directory.lock().is_held():
        raise CheckpointError.of(
            f"{directory.root} is being trained by process {directory.lock().pid() or 'unknown'}, which may need them",
            "a run that is not being trained",
            f"`{command_text('simpletuner', 'run', 'stop', directory.root, '--wait')}` saves and ends it.",
        )
    with directory.lock():
        newest_good = next((each.step for each in checkpoints.newest_first(directory) if each.damage is None), None)
        doomed = named or [step for step in checkpoints.steps(directory) if step != newest_good]
        if newest_good in doomed and not command.yes:
            raise CheckpointError.of(
                f"step {newest_good} is the newest checkpoint of {directory.root} that verifies: "
                "the run resumes from it",
                "another step",
                "Give --yes to delete it anyway.",
            )
        deleted = [each for step in doomed if (each := _listed(directory, step)) is not None]
        if deleted and not command.yes:
            steps = ", ".join(str(each.step) for each in deleted)
            target = f"the checkpoints of steps {steps}" if len(deleted) > 1 else f"the checkpoint of step {steps}"
            confirm_deletion(target, format_size(sum(each.bytes for each in deleted)))
        for step in doomed:
            checkpoints.remove(directory, step)
    remaining = checkpoints.steps(directory)
    if command.json:
        say(_json(directory, "deleted", [each.__dict__ for each in deleted], kept=remaining))
    else:
        say(f"{len(deleted)} deleted, {format_size(sum(each.bytes for each in deleted))}; {len(remaining)} kept.")
    return 0


def _typed_steps(directory: RunDirectory, typed: tuple[tuple[int, ...], ...]) -> list[int]:
    """The steps of all `--step` flags, without duplicates.

    Raises:
        CheckpointError: there is no checkpoint of a step.
    """
    existing = checkpoints.steps(directory)
    expected = f"one of {', '.join(map(str, existing))}" if existing else ""
    steps = list(dict.fromkeys(step for steps in typed for step in steps))
    CheckpointError.raise_if(
        Problem(f"{directory.root} has no checkpoint of step {step}", expected)
        for step in steps
        if step not in existing
    )
    return steps


def _listed(directory: RunDirectory, step: int) -> ListedCheckpoint | None:
    """The checkpoint of `step`; None if the run has pruned it in the meantime."""
    folder = directory.checkpoint(step)
    try:
        changed = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
        return ListedCheckpoint(step, str(folder), checkpoints.size(folder), changed.isoformat(timespec="seconds"))
    except FileNotFoundError:
        return None


def _local(time: str) -> str:
    return datetime.datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M")


def _json(directory: RunDirectory, key: str, entries: list[dict[str, Any]], **fields: object) -> str:
    return json_text({"run": str(directory.root), key: entries} | fields)
