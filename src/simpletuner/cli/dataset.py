"""`simpletuner dataset`: the images before a run. What will be trained, what it looks like, and its caches; captions
changed together, duplicates, deletion."""

from collections.abc import Iterator
from dataclasses import dataclass

from simpletuner.base.console import say
from simpletuner.base.errors import Problem
from simpletuner.cli import imagefolder
from simpletuner.cli.arguments import Flag, parse_command, verb_of
from simpletuner.cli.printing import json_text

USAGE = """usage: simpletuner dataset scan|show|cache [--json] [--set ID] [--verify] [options of `simpletuner train`]
       simpletuner dataset captions FOLDER [--find TEXT --replace TEXT [--regex]] [--prepend TEXT] [--append TEXT]
       simpletuner dataset captions FOLDER --undo
       simpletuner dataset duplicates FOLDER
       simpletuner dataset delete FOLDER --names FILE [--partners FOLDER] | --undo | --empty-trash

  scan        count the pictures, their sizes, and what is left out and why
  show        draw the crops that will be trained, with their captions, on one sheet a set
  cache       encode the captions and pictures now, so that a run starts at once
  captions    change the captions of the images in FOLDER; without a change, count them
  duplicates  list images with the same bytes, and images that look nearly the same
  delete      move images with their captions into FOLDER/.simpletuner/trash, from which --undo brings them back
"""


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count == 0:
        raise ValueError(text)
    return count


@dataclass(frozen=True)
class DatasetCommand:
    """What is typed after `simpletuner dataset` and its verb."""

    json: bool = Flag("print one JSON object instead of a table").default(False)
    pictures: bool = Flag("in it, each picture with its size, crop and captions (scan)").default(False)
    progress: bool = Flag(
        "a JSON line on standard error as the work goes on: what, done and total (scan and cache)"
    ).default(False)
    set: str = Flag("this set only (scan and show)", "ID").default("")
    verify: bool = Flag(
        "read every cached file, instead of only those that changed since they were last read (cache)"
    ).default(False)
    out: str = Flag("where show puts its sheets; by default output_dir", "FOLDER").default("")
    count: int = Flag(
        "how many crops a sheet shows, 24 by default, spread evenly over the set",
        "N",
        convert=_count,
        expects="a whole number above 0",
    ).default(24)
    train_options: tuple[str, ...] = ()


FORMS: dict[str, type[DatasetCommand] | type[imagefolder.FolderCommand]] = {
    **dict.fromkeys(("scan", "show", "cache"), DatasetCommand),
    **dict.fromkeys(("captions", "duplicates", "delete"), imagefolder.FolderCommand),
}
"""What is typed after each verb."""


def run(arguments: list[str]) -> int:
    """Scan, show or cache the sets of the configuration; change, compare or delete images of a folder.

    Raises:
        ConfigError: a mistake in what was typed or in the configuration.
        DataError: a set, folder or image is missing, nothing can be trained, or captions changed meanwhile.
        DiskError: a file cannot be written.
    """
    verb = verb_of("dataset", arguments, FORMS)
    if FORMS[verb] is imagefolder.FolderCommand:
        return imagefolder.run(verb, arguments[1:])
    command = parse_command(DatasetCommand, arguments[1:], check=lambda command: _misplaced(command, verb))
    # numpy and Pillow, which changing captions does without.
    from simpletuner.cli import scanning

    result, text = scanning.work(verb, command)
    say(json_text(result) if command.json else text)
    return 0


def _misplaced(command: DatasetCommand, verb: str) -> Iterator[Problem]:
    """The problems of flags that do not go with `verb`, or with each other."""
    for flag, is_given, verbs in (
        ("verify", command.verify, ("cache",)),
        ("pictures", command.pictures, ("scan",)),
        ("progress", command.progress, ("scan", "cache")),
    ):
        if is_given and verb not in verbs:
            yield Problem(f"--{flag} with dataset {verb}", f"dataset {' or '.join(verbs)}")
    if command.pictures and verb == "scan" and not command.json:
        yield Problem("--pictures without --json", "both", "`simpletuner dataset show` draws the pictures.")
