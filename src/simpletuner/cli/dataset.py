"""`simpletuner dataset`: inspect and cache a run's datasets; edit captions, find duplicates, delete images."""

from collections.abc import Iterator
from dataclasses import dataclass

from simpletuner.base.console import say
from simpletuner.base.errors import Problem
from simpletuner.cli import imagefolder
from simpletuner.cli.arguments import Flag, parse_command, verb_of, whole_number
from simpletuner.cli.printing import json_text

USAGE = """usage: simpletuner dataset scan|show|cache [--json] [--set ID] [--verify] [options of `simpletuner train`]
       simpletuner dataset captions FOLDER [--find TEXT --replace TEXT [--regex]] [--prepend TEXT] [--append TEXT]
       simpletuner dataset captions FOLDER --undo
       simpletuner dataset duplicates FOLDER
       simpletuner dataset delete FOLDER --names FILE [--partners FOLDER] | --undo | --empty-trash

  scan        count the images and their sizes, and list the images that are left out, with the reason
  show        write a contact sheet of each dataset: the crops that the run trains on, with their captions
  cache       encode the captions and images now, so that training starts at once
  captions    change the captions of the images in FOLDER; without a change, count them
  duplicates  list images with the same bytes, and images that look nearly the same
  delete      move images with their captions into FOLDER/.simpletuner/trash; --undo restores them
"""


@dataclass(frozen=True)
class DatasetCommand:
    """Arguments of `simpletuner dataset scan|show|cache`."""

    json: bool = Flag("print one JSON object instead of a table").default(False)
    pictures: bool = Flag("add each image with its size, crop and captions to the JSON object (scan)").default(False)
    progress: bool = Flag(
        "print progress as JSON lines on standard error: what, done and total (scan and cache)"
    ).default(False)
    set: str = Flag("only this dataset (scan and show)", "ID").default("")
    verify: bool = Flag("read every cached file, not only those that changed since the last read (cache)").default(
        False
    )
    out: str = Flag("the folder for the contact sheets of show; by default output_dir", "FOLDER").default("")
    count: int = Flag(
        "number of crops on a contact sheet, spread evenly over the dataset; 24 by default",
        "N",
        convert=whole_number,
        expects="a whole number above 0",
    ).default(24)
    train_options: tuple[str, ...] = ()


FORMS: dict[str, type[DatasetCommand] | type[imagefolder.FolderCommand]] = {
    **dict.fromkeys(("scan", "show", "cache"), DatasetCommand),
    **dict.fromkeys(("captions", "duplicates", "delete"), imagefolder.FolderCommand),
}
"""The arguments of each verb."""


def run(arguments: list[str]) -> int:
    """Scan, show or cache the datasets of the configuration, or edit captions, find duplicates or delete images.

    Raises:
        ConfigError: a mistake in the arguments or in the configuration.
        DataError: a dataset, folder or image is missing, no image can be trained on, or captions changed
            in the meantime.
        DiskError: a file cannot be written.
    """
    verb = verb_of("dataset", arguments, FORMS)
    if FORMS[verb] is imagefolder.FolderCommand:
        return imagefolder.run(verb, arguments[1:])
    command = parse_command(DatasetCommand, arguments[1:], check=lambda command: _misplaced(command, verb))
    # Imported late, because it loads numpy and Pillow, which editing captions does not need.
    from simpletuner.cli import scanning

    result, text = scanning.execute(verb, command)
    say(json_text(result) if command.json else text)
    return 0


def _misplaced(command: DatasetCommand, verb: str) -> Iterator[Problem]:
    """Problems with flags that do not apply to `verb`, or that need another flag."""
    for flag, is_given, verbs in (
        ("verify", command.verify, ("cache",)),
        ("pictures", command.pictures, ("scan",)),
        ("progress", command.progress, ("scan", "cache")),
    ):
        if is_given and verb not in verbs:
            yield Problem(f"--{flag} with dataset {verb}", f"dataset {' or '.join(verbs)}")
    if command.pictures and verb == "scan" and not command.json:
        yield Problem("--pictures without --json", "both", "`simpletuner dataset show` shows the images.")
