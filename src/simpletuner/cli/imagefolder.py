"""`simpletuner dataset captions|duplicates|delete`: the images of a folder and their captions, changed together."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import command_text
from simpletuner.base.console import answer_to, complain, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.cli.arguments import Flag, Positional, parse_command
from simpletuner.cli.printing import json_text, table
from simpletuner.data.captionedits import (
    CHANGED_SINCE,
    CaptionPlan,
    TextEdit,
    apply_caption_plan,
    plan_caption_edit,
    undo_captions,
    without_caption,
)
from simpletuner.data.ownfolder import listed_images
from simpletuner.data.removal import bring_back, empty_trash, plan_partner_removal, plan_removal, remove_images
from simpletuner.data.sample import Rejection

SHOWN = 10
"""Changes and names that are printed for people."""


@dataclass(frozen=True)
class FolderCommand:
    """What is typed after `simpletuner dataset` and a verb about a folder."""

    folder: Path | None = Positional(convert=Path).default(None)
    find: str = Flag("the text to replace, each time it occurs (captions)", "TEXT", verbs=("captions",)).default("")
    replace: str = Flag("what to write instead; by default nothing (captions)", "TEXT", verbs=("captions",)).default("")
    regex: bool = Flag(
        "--find is a regular expression of Python; ^ and $ match at each line,\n\\1 in --replace is its first group "
        "(captions)",
        verbs=("captions",),
    ).default(False)
    prepend: str = Flag("write this before each caption (captions)", "TEXT", verbs=("captions",)).default("")
    append: str = Flag("write this after each caption (captions)", "TEXT", verbs=("captions",)).default("")
    whole: bool = Flag(
        "a file is one caption, as with disable_multiline_split; otherwise each line is\none (captions)",
        verbs=("captions",),
    ).default(False)
    missing: bool = Flag(
        "only images without a caption; without a change, list them (captions)", verbs=("captions",)
    ).default(False)
    names: str = Flag(
        "only these images: a file with a path relative to FOLDER on each line\n(captions and delete)",
        "FILE",
        verbs=("captions", "delete"),
    ).default("")
    partners: tuple[Path, ...] = Flag(
        "also delete their references or masks in this folder; may be given more than once (delete)",
        "FOLDER",
        convert=Path,
        is_repeatable=True,
        verbs=("delete",),
    ).default(())
    dry_run: bool = Flag("change nothing, say what would be changed", verbs=("captions", "delete")).default(False)
    revision: str = Flag(
        "refuse if the captions changed since the --dry-run that printed this (captions)", "HASH", verbs=("captions",)
    ).default("")
    undo: bool = Flag("take the last change, or the last deletion, back", verbs=("captions", "delete")).default(False)
    empty_trash: bool = Flag("delete for good what was deleted before (delete)", verbs=("delete",)).default(False)
    yes: bool = Flag("do not ask (delete)", verbs=("delete",)).default(False)
    progress: bool = Flag(
        "a JSON line on standard error as the work goes on (duplicates)", verbs=("duplicates",)
    ).default(False)
    json: bool = Flag("print one JSON object").default(False)

    @property
    def edit(self) -> TextEdit:
        """The change of each caption."""
        return TextEdit(self.find, self.replace, self.regex, self.prepend, self.append, self.whole)


Result = tuple[dict[str, Any], str]
"""As JSON and for people."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Change, compare or delete images of a folder.

    Raises:
        ConfigError: a mistake in what was typed.
        DataError: no such folder or image, or the captions changed meanwhile.
        DiskError: a file cannot be written.
    """
    works: dict[str, Callable[[Path, FolderCommand], Result]] = {
        "captions": _captions,
        "duplicates": _duplicates,
        "delete": _delete,
    }
    command = parse_command(FolderCommand, arguments, verb, check=lambda command: _misplaced(command, verb))
    assert command.folder is not None
    result, text = works[verb](command.folder, command)
    say(json_text(result) if command.json else text)
    return 0


def _misplaced(command: FolderCommand, verb: str) -> Iterator[Problem]:
    if command.folder is None:
        yield Problem(f"dataset {verb}: no folder", "its path", f"Type `simpletuner dataset {verb} FOLDER`.")
    if verb == "delete" and (bool(command.names) + command.undo + command.empty_trash) != 1:
        yield Problem("dataset delete", "one of --names FILE, --undo and --empty-trash")
    if command.partners and not command.names:
        yield Problem("--partners without --names", "the images whose partners are meant")
    if command.folder is not None and command.folder.resolve() in {each.resolve() for each in command.partners}:
        yield Problem(
            f"--partners={command.folder}: this is the folder of the images", "a folder of references or masks"
        )
    has_edit = bool(command.find or command.prepend or command.append)
    if command.undo and (has_edit or command.names or command.missing or command.dry_run):
        yield Problem("--undo with other flags", "--undo by itself")
    if (command.replace or command.regex) and not command.find:
        yield Problem("--replace or --regex without --find", "--find TEXT as well")


def _captions(folder: Path, command: FolderCommand) -> Result:
    if command.undo:
        undone, left = undo_captions(folder)
        return {"undone": undone, "left_out": _as_rows(left)}, _with_left_out(f"{undone} captions are as before.", left)
    names = _names(command.names) if command.names else None
    if command.missing:
        listed = listed_images(folder)
        missing = without_caption(folder, listed)
        names = missing if names is None else [name for name in names if name in set(missing)]
    if command.edit.is_empty:
        return _counted(folder, names)
    plan = plan_caption_edit(folder, command.edit, names)
    if command.revision and command.revision != plan.revision:
        raise ConfigError.of(
            "--revision: the captions are not what they were",
            remedy="Look at the change again with --dry-run, then use the revision that it prints.",
        )
    left = list(plan.left_out)
    if not command.dry_run and plan.changes:
        left += apply_caption_plan(plan)
    return _told(plan, left, command.dry_run)


def _told(plan: CaptionPlan, left: list[Rejection], is_dry: bool) -> Result:
    changed = len(plan.changes) - sum(each.reason == CHANGED_SINCE for each in left)
    result = {
        "images": plan.images,
        "changed": changed,
        "emptied": plan.emptied,
        "revision": plan.revision,
        "changes": [
            {"file": c.file, "images": list(c.images), "before": c.text_before, "after": c.after.decode()}
            for c in plan.changes[:SHOWN]
        ],
        "left_out": _as_rows(left),
    }
    done = "would change" if is_dry else "changed"
    lines = [f"{changed} captions of {plan.images} images {done}."]
    for change in plan.changes[:SHOWN]:
        lines += [f"  {change.file}", f"    - {change.text_before.strip()}", f"    + {change.after.decode().strip()}"]
    if len(plan.changes) > SHOWN:
        lines.append(f"  and {len(plan.changes) - SHOWN} more")
    if plan.emptied:
        lines.append(f"{plan.emptied} of them say nothing afterwards: training leaves out such images.")
    if not is_dry and changed:
        undo = command_text("simpletuner", "dataset", "captions", plan.folder, "--undo")
        lines.append(f"`{undo}` takes it back.")
    return result, _with_left_out("\n".join(lines), left)


def _counted(folder: Path, names: Sequence[str] | None) -> Result:
    """What there is: all images, or those of `names`, without a change."""
    listed = listed_images(folder)
    missing = set(without_caption(folder, listed))
    chosen = list(listed.images) if names is None else [name for name in names if name in listed.images]
    without = [name for name in chosen if name in missing]
    result = {"images": len(chosen), "missing": len(without), "names": without}
    return result, "\n".join(
        [f"images: {len(chosen)}, without a caption: {len(without)}", *(f"  {n}" for n in without)]
    )


def _duplicates(folder: Path, command: FolderCommand) -> Result:
    # numpy and Pillow, which the other verbs do without.
    from simpletuner.data.duplicates import find_duplicates

    def report(done: int, total: int) -> None:
        if command.progress and (done % 20 == 0 or done == total):
            complain(json.dumps({"what": "images", "done": done, "total": total}))

    groups, unread = find_duplicates(folder, workers=min(8, os.cpu_count() or 1), report=report)
    result = {
        "groups": [{"kind": group.kind, "names": list(group.names)} for group in groups],
        "left_out": _as_rows(unread),
    }
    if not groups:
        return result, _with_left_out("No image is there twice.", unread)
    words = {"exact": "the same bytes", "near": "nearly the same: look before you delete"}
    rows = [(words[group.kind] if at == 0 else "", name) for group in groups for at, name in enumerate(group.names)]
    return result, _with_left_out(table(rows), unread)


def _delete(folder: Path, command: FolderCommand) -> Result:
    if command.undo:
        returned, left = bring_back(folder)
        return {"undone": returned, "left_out": _as_rows(left)}, _with_left_out(f"{returned} files are back.", left)
    if command.empty_trash:
        _ask(f"Delete for good what was deleted from {folder}?", command)
        count = empty_trash(folder)
        return {"deleted": count}, f"{count} files are deleted for good."
    plan = plan_removal(folder, _names(command.names))
    beside = [plan_partner_removal(plan, each) for each in dict.fromkeys(command.partners)]
    partners = sum(len(each.images) for each in beside)
    found = f"{len(plan.images)} images and {len(plan.captions)} captions"
    if command.partners:
        found = f"{len(plan.images)} images, {len(plan.captions)} captions and {partners} partners"
    left = [rejection for each in (plan, *beside) for rejection in each.left_out]
    result: dict[str, Any] = {
        "images": len(plan.images),
        "captions": len(plan.captions),
        "partners": partners,
        "left_out": _as_rows(left),
        "trash": "",
    }
    if command.dry_run or not plan.images:
        return result, _with_left_out(f"{found} would be deleted.", left)
    _ask(f"Delete {found} of {plan.folder}?", command)
    # The images last: where a partner cannot be moved, the same command can be typed again.
    held = [each for each in beside if each.images]
    trashes = {each.folder: remove_images(each) for each in (*held, plan)}
    lines = []
    for each in (plan, *held):
        trash = trashes[each.folder]
        undo = command_text("simpletuner", "dataset", "delete", each.folder, "--undo")
        lines.append(f"{len(each.images) + len(each.captions)} files are in {trash}; `{undo}` brings them back.")
        result["trash"] = result["trash"] or str(trash)
    return result, _with_left_out("\n".join((f"{found} are deleted.", *lines)), left)


def _ask(question: str, command: FolderCommand) -> None:
    """Ask once, unless --yes says not to.

    Raises:
        ConfigError: the answer is no, or nobody can be asked.
    """
    if not command.yes and answer_to(f"{question} [y/N] ") not in ("y", "Y", "yes"):
        raise ConfigError.of("not deleted", remedy="Type y to delete, or give --yes.")


def _names(file: str) -> list[str]:
    with file_errors_reported(Path(file), ConfigError, doing="read"):
        text = Path(file).read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line]


def _as_rows(left_out: Sequence[Rejection]) -> list[dict[str, str]]:
    return [each.__dict__ for each in left_out]


def _with_left_out(text: str, left_out: Sequence[Rejection]) -> str:
    if not left_out:
        return text
    return f"{text}\nLeft out:\n{table([(each.name, each.reason, each.detail) for each in left_out], indent='  ')}"
