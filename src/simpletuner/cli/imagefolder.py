"""`simpletuner dataset captions|duplicates|delete`: edit the captions of a folder's images, find duplicates, delete."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import command_text
from simpletuner.base.console import ask_user, complain, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import trashed_files
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
from simpletuner.data.removal import empty_trash, plan_partner_removal, plan_removal, remove_images, restore_images
from simpletuner.data.sample import Rejection

MAX_SHOWN = 10
"""Maximum number of caption changes that are printed."""


@dataclass(frozen=True)
class FolderCommand:
    """Arguments of `simpletuner dataset captions|duplicates|delete`."""

    folder: Path | None = Positional(convert=Path).default(None)
    find: str = Flag("the text to replace, at every occurrence (captions)", "TEXT", verbs=("captions",)).default("")
    replace: str = Flag("the replacement; by default empty (captions)", "TEXT", verbs=("captions",)).default("")
    regex: bool = Flag(
        "treat --find as a Python regular expression; ^ and $ match at each line,\nand \\1 in --replace is the first "
        "group (captions)",
        verbs=("captions",),
    ).default(False)
    prepend: str = Flag("text to add before each caption (captions)", "TEXT", verbs=("captions",)).default("")
    append: str = Flag("text to add after each caption (captions)", "TEXT", verbs=("captions",)).default("")
    whole: bool = Flag(
        "treat each file as one caption, as disable_multiline_split does; by default each\nline is one (captions)",
        verbs=("captions",),
    ).default(False)
    missing: bool = Flag(
        "only images without a caption; without a change, list them (captions)", verbs=("captions",)
    ).default(False)
    names: str = Flag(
        "only these images: a file that lists paths relative to FOLDER, one per line\n(captions and delete)",
        "FILE",
        verbs=("captions", "delete"),
    ).default("")
    partners: tuple[Path, ...] = Flag(
        "also delete the images' references or masks in this folder; may be repeated (delete)",
        "FOLDER",
        convert=Path,
        is_repeatable=True,
        verbs=("delete",),
    ).default(())
    dry_run: bool = Flag("print the changes without making them", verbs=("captions", "delete")).default(False)
    revision: str = Flag(
        "fail if the captions changed since the --dry-run that printed HASH (captions)", "HASH", verbs=("captions",)
    ).default("")
    undo: bool = Flag("undo the last change or the last deletion", verbs=("captions", "delete")).default(False)
    empty_trash: bool = Flag("delete the files in the trash permanently (delete)", verbs=("delete",)).default(False)
    yes: bool = Flag("delete without confirmation (delete)", verbs=("delete",)).default(False)
    progress: bool = Flag("print progress as JSON lines on standard error (duplicates)", verbs=("duplicates",)).default(
        False
    )
    json: bool = Flag("print one JSON object").default(False)

    @property
    def edit(self) -> TextEdit:
        """The change of each caption."""
        return TextEdit(self.find, self.replace, self.regex, self.prepend, self.append, self.whole)


Result = tuple[dict[str, Any], str]
"""The result of a command, as a JSON object and as text."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Edit captions, find duplicates or delete images in a folder.

    Raises:
        ConfigError: a mistake in the arguments.
        DataError: a folder or image does not exist, or the captions changed in the meantime.
        DiskError: a file cannot be written.
    """
    actions: dict[str, Callable[[Path, FolderCommand], Result]] = {
        "captions": _captions,
        "duplicates": _duplicates,
        "delete": _delete,
    }
    command = parse_command(FolderCommand, arguments, verb, check=lambda command: _misplaced(command, verb))
    assert command.folder is not None
    result, text = actions[verb](command.folder, command)
    say(json_text(result) if command.json else text)
    return 0


def _misplaced(command: FolderCommand, verb: str) -> Iterator[Problem]:
    if command.folder is None:
        yield Problem(f"dataset {verb}: no folder", "its path", f"Type `simpletuner dataset {verb} FOLDER`.")
    if verb == "delete" and (bool(command.names) + command.undo + command.empty_trash) != 1:
        yield Problem("dataset delete", "one of --names FILE, --undo and --empty-trash")
    if command.partners and not command.names:
        yield Problem("--partners without --names", "--names FILE, the images whose partners to delete")
    if command.folder is not None and command.folder.resolve() in {each.resolve() for each in command.partners}:
        yield Problem(f"--partners={command.folder}: the same folder as the images", "a folder of references or masks")
    has_edit = bool(command.find or command.prepend or command.append)
    if command.undo and (has_edit or command.names or command.missing or command.dry_run):
        yield Problem("--undo with other flags", "--undo alone")
    if (command.replace or command.regex) and not command.find:
        yield Problem("--replace or --regex without --find", "--find TEXT as well")


def _captions(folder: Path, command: FolderCommand) -> Result:
    if command.undo:
        undone, left_out = undo_captions(folder)
        text = f"{undone} captions are restored."
        if not undone and left_out:
            retry = command_text("simpletuner", "dataset", "captions", folder, "--undo")
            text = f"No caption is restored, because all changed since the edit. `{retry}` tries it again."
        return {"undone": undone, "left_out": _as_rows(left_out)}, _with_left_out(text, left_out)
    names = _names(command.names) if command.names else None
    if command.missing:
        listed = listed_images(folder)
        missing = without_caption(folder, listed)
        names = missing if names is None else [name for name in names if name in set(missing)]
    if command.edit.is_empty:
        return _count_captions(folder, names)
    plan = plan_caption_edit(folder, command.edit, names)
    if command.revision and command.revision != plan.revision:
        raise ConfigError.of(
            "--revision: the captions have changed since then",
            remedy="Check the change again with --dry-run, then use the revision that it prints.",
        )
    left_out = list(plan.left_out)
    if not command.dry_run and plan.changes:
        left_out += apply_caption_plan(plan)
    return _edit_result(plan, left_out, command.dry_run)


def _edit_result(plan: CaptionPlan, left_out: list[Rejection], is_dry: bool) -> Result:
    changed = len(plan.changes) - sum(each.reason == CHANGED_SINCE for each in left_out)
    result = {
        "images": plan.images,
        "changed": changed,
        "emptied": plan.emptied,
        "revision": plan.revision,
        "changes": [
            {"file": c.file, "images": list(c.images), "before": c.text_before, "after": c.after.decode()}
            for c in plan.changes[:MAX_SHOWN]
        ],
        "left_out": _as_rows(left_out),
    }
    outcome = "would change" if is_dry else "changed"
    lines = [f"{changed} captions of {plan.images} images {outcome}."]
    for change in plan.changes[:MAX_SHOWN]:
        lines += [f"  {change.file}", f"    - {change.text_before.strip()}", f"    + {change.after.decode().strip()}"]
    if len(plan.changes) > MAX_SHOWN:
        lines.append(f"  and {len(plan.changes) - MAX_SHOWN} more")
    if plan.emptied:
        lines.append(f"{plan.emptied} of them become empty: training leaves out images with an empty caption.")
    if not is_dry and changed:
        undo = command_text("simpletuner", "dataset", "captions", plan.folder, "--undo")
        lines.append(f"`{undo}` undoes the change.")
    return result, _with_left_out("\n".join(lines), left_out)


def _count_captions(folder: Path, names: Sequence[str] | None) -> Result:
    """Count all images, or those in `names`, and list the ones without a caption."""
    listed = listed_images(folder)
    missing = set(without_caption(folder, listed))
    chosen = list(listed.images) if names is None else [name for name in names if name in listed.images]
    without = [name for name in chosen if name in missing]
    result = {"images": len(chosen), "missing": len(without), "names": without}
    return result, "\n".join(
        [f"images: {len(chosen)}, without a caption: {len(without)}", *(f"  {n}" for n in without)]
    )


def _duplicates(folder: Path, command: FolderCommand) -> Result:
    # Imported late, because it loads numpy and Pillow, which the other verbs do not need.
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
        return result, _with_left_out("There are no duplicates.", unread)
    words = {"exact": "the same bytes", "near": "nearly the same: check before you delete"}
    rows = [(words[group.kind] if i == 0 else "", name) for group in groups for i, name in enumerate(group.names)]
    return result, _with_left_out(table(rows), unread)


def _delete(folder: Path, command: FolderCommand) -> Result:
    if command.undo:
        restored, left_out = restore_images(folder)
        remaining = trashed_files(folder)
        earlier = remaining - len(left_out)
        text = f"{restored} files of the last deletion are restored."
        if earlier:
            text += f" {earlier} files of earlier deletions are still in the trash"
            undo = command_text("simpletuner", "dataset", "delete", folder, "--undo")
            text += "." if left_out else f"; `{undo}` undoes the deletion before it."
        counts = {"undone": restored, "remaining": remaining}
        return {**counts, "left_out": _as_rows(left_out)}, _with_left_out(text, left_out)
    if command.empty_trash:
        _ask(f"Delete the files in the trash of {folder} permanently?", command)
        count = empty_trash(folder)
        return {"deleted": count}, f"{count} files are deleted permanently."
    plan = plan_removal(folder, _names(command.names))
    partner_plans = [plan_partner_removal(plan, each) for each in dict.fromkeys(command.partners)]
    partners = sum(len(each.images) for each in partner_plans)
    files = f"{len(plan.images)} images and {len(plan.captions)} captions"
    if command.partners:
        files = f"{len(plan.images)} images, {len(plan.captions)} captions and {partners} partners"
    left_out = [rejection for each in (plan, *partner_plans) for rejection in each.left_out]
    result: dict[str, Any] = {
        "images": len(plan.images),
        "captions": len(plan.captions),
        "partners": partners,
        "left_out": _as_rows(left_out),
        "trash": "",
    }
    if command.dry_run or not plan.images:
        return result, _with_left_out(f"{files} would be deleted.", left_out)
    _ask(f"Delete {files} of {plan.folder}?", command)
    # Move the images last: if moving a partner fails, the user can type the same command again.
    nonempty_plans = [each for each in partner_plans if each.images]
    trashes = {each.folder: remove_images(each) for each in (*nonempty_plans, plan)}
    lines = []
    for each in (plan, *nonempty_plans):
        trash = trashes[each.folder]
        undo = command_text("simpletuner", "dataset", "delete", each.folder, "--undo")
        lines.append(f"{len(each.images) + len(each.captions)} files are in {trash}; `{undo}` restores them.")
        result["trash"] = result["trash"] or str(trash)
    return result, _with_left_out("\n".join((f"{files} are deleted.", *lines)), left_out)


def _ask(question: str, command: FolderCommand) -> None:
    """Ask `question` at the terminal, unless --yes is given.

    Raises:
        ConfigError: the answer is no, or there is no terminal.
    """
    if not command.yes and ask_user(f"{question} [y/N] ") not in ("y", "Y", "yes"):
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
