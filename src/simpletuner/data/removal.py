"""Images that are deleted with their captions: moved into a hidden folder inside theirs, from which they come back."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import DataError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import TRASH_FOLDER, caption_key, find_partners
from simpletuner.data.ownfolder import check_names, inside, listed_images, own_folder
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Rejection


@dataclass(frozen=True)
class RemovalPlan:
    """What a deletion takes, not taken yet."""

    folder: Path
    images: tuple[str, ...]
    captions: tuple[str, ...]
    """Caption files of no other image."""
    left_out: tuple[Rejection, ...]
    """Images that cannot be taken."""


def plan_removal(folder: Path, names: Collection[str]) -> RemovalPlan:
    """What goes with the images `names`.

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
    staying = {caption_key(name) for name in listed.images.keys() - set(images)}
    keys = dict.fromkeys(caption_key(name) for name in images if caption_key(name) not in staying)
    captions = [file.name for key in keys for file in listed.captions.get(key, ())]
    return RemovalPlan(folder, tuple(images), tuple(captions), tuple(left_out))


def plan_partner_removal(plan: RemovalPlan, folder: Path) -> RemovalPlan:
    """Plan the removal of the references or masks in `folder` that belong to the images of `plan` and to no other.

    Raises:
        DataError: no such folder.
    """
    names = listed_images(plan.folder).images
    staying = {caption_key(name) for name in names.keys() - set(plan.images)}
    partners = find_partners(names, listed_images(folder).images, is_numbered=True)
    keys = {caption_key(name) for name in plan.images} - staying
    return plan_removal(folder, [name for key in keys for _, name in partners.get(key, [])])


def remove_images(plan: RemovalPlan) -> Path:
    """Move the files into the folder's trash, links as links; gives the folder in it. They are deleted for good by
    `empty_trash`.

    Raises:
        DiskError: not permitted.
    """
    with own_folder(plan.folder) as own, file_errors_reported(own, doing="move files to"):
        last = max(_deletions(own), default=0)
        into = own / TRASH_FOLDER / str(last + 1)
        into.mkdir(parents=True)
        for name in (*plan.images, *plan.captions):
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(plan.folder / name, target)
    return into


def bring_back(folder: Path) -> tuple[int, list[Rejection]]:
    """Undo the last deletion: how many files came back, and those that stay in the trash because something is in
    their place.

    Raises:
        DataError: the trash is empty.
        DiskError: not permitted.
    """
    returned, left = 0, []
    with own_folder(folder) as own, file_errors_reported(own, doing="move files from"):
        last = max(_deletions(own), default=0)
        if not last:
            raise DataError.of(f"{folder}: nothing was deleted that could come back")
        source = own / TRASH_FOLDER / str(last)
        for path in sorted(each for each in source.rglob("*") if each.is_symlink() or not each.is_dir()):
            name = path.relative_to(source).as_posix()
            target = inside(folder, name)
            if os.path.lexists(target):
                left.append(Rejection(name, "in the way", "there is a file of this name"))
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            returned += 1
        if not left:
            shutil.rmtree(source)
    return returned, left


def empty_trash(folder: Path) -> int:
    """Delete for good what was deleted from a folder before; gives how many files.

    Raises:
        DiskError: not permitted.
    """
    with own_folder(folder) as own, file_errors_reported(own, doing="delete in"):
        trash = own / TRASH_FOLDER
        files = sum(each.is_symlink() or not each.is_dir() for each in trash.rglob("*"))
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
    return files


def _deletions(own: Path) -> list[int]:
    trash = own / TRASH_FOLDER
    return [int(each.name) for each in trash.iterdir() if each.name.isdecimal()] if trash.is_dir() else []
