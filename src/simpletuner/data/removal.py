"""Delete images with their captions: move them to a hidden trash in their folder, from which they can be restored."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import DataError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import TRASH_FOLDER, caption_key, find_partners, trashed_files
from simpletuner.data.ownfolder import check_names, inside, listed_images, own_folder
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Rejection


@dataclass(frozen=True)
class RemovalPlan:
    """The files that a deletion will move to the trash."""

    folder: Path
    images: tuple[str, ...]
    captions: tuple[str, ...]
    """Caption files that belong to no other image."""
    left_out: tuple[Rejection, ...]
    """Images that cannot be deleted."""


def plan_removal(folder: Path, names: Collection[str]) -> RemovalPlan:
    """Plan the removal of the images `names` and of the captions that no other image uses.

    Raises:
        DataError: no such folder or image.
    """
    listed = listed_images(folder)
    chosen = sorted(set(names))
    check_names(folder, listed, chosen)
    images, left_out = [], []
    for name in chosen:
        try:
            inside(folder, name)
            images.append(name)
        except Rejected as rejected:
            left_out.append(Rejection(name, rejected.reason, rejected.detail))
    remaining_keys = {caption_key(name) for name in listed.images.keys() - set(images)}
    keys = dict.fromkeys(caption_key(name) for name in images if caption_key(name) not in remaining_keys)
    captions = [file.name for key in keys for file in listed.captions.get(key, ())]
    return RemovalPlan(folder, tuple(images), tuple(captions), tuple(left_out))


def plan_partner_removal(plan: RemovalPlan, folder: Path) -> RemovalPlan:
    """Plan the removal of references or masks in `folder` that belong to the images of `plan` and to no other image.

    Raises:
        DataError: no such folder.
    """
    names = listed_images(plan.folder).images
    remaining_keys = {caption_key(name) for name in names.keys() - set(plan.images)}
    partners = find_partners(names, listed_images(folder).images, is_numbered=True)
    keys = {caption_key(name) for name in plan.images} - remaining_keys
    return plan_removal(folder, [name for key in keys for _, name in partners.get(key, [])])


def remove_images(plan: RemovalPlan) -> Path:
    """Move the files of `plan` to the folder's trash, links as links, until `empty_trash` deletes them permanently.
    Returns their folder in the trash.

    Raises:
        DiskError: not permitted.
    """
    with own_folder(plan.folder) as hidden, file_errors_reported(hidden, doing="move files to"):
        last = max(_deletions(hidden), default=0)
        trash = hidden / TRASH_FOLDER / str(last + 1)
        trash.mkdir(parents=True)
        for name in (*plan.images, *plan.captions):
            target = trash / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(plan.folder / name, target)
    return trash


def restore_images(folder: Path) -> tuple[int, list[Rejection]]:
    """Undo the last deletion that is in the trash, not the earlier ones. Returns the number of restored files, and the
    files that stay in the trash because a file of their name exists.

    Raises:
        DataError: the trash is empty.
        DiskError: not permitted.
    """
    returned, blocked = 0, []
    with own_folder(folder) as hidden, file_errors_reported(hidden, doing="move files from"):
        last = max(_deletions(hidden), default=0)
        if not last:
            raise DataError.of(f"{folder}: there are no deleted files to restore")
        source = hidden / TRASH_FOLDER / str(last)
        for path in sorted(each for each in source.rglob("*") if each.is_symlink() or not each.is_dir()):
            name = path.relative_to(source).as_posix()
            target = inside(folder, name)
            if os.path.lexists(target):
                blocked.append(Rejection(name, "in the way", "there is a file of this name"))
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            returned += 1
        if not blocked:
            shutil.rmtree(source)
    return returned, blocked


def empty_trash(folder: Path) -> int:
    """Delete the files in a folder's trash permanently. Returns their number.

    Raises:
        DiskError: not permitted.
    """
    with own_folder(folder) as hidden, file_errors_reported(hidden, doing="delete in"):
        trash = hidden / TRASH_FOLDER
        files = trashed_files(folder)
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
    return files


def _deletions(hidden: Path) -> list[int]:
    trash = hidden / TRASH_FOLDER
    return [int(each.name) for each in trash.iterdir() if each.name.isdecimal()] if trash.is_dir() else []
