"""The images of a folder: listed, searched, captioned together, deleted and brought back."""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from simpletuner.base.imagefiles import caption_key, find_partners
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import LONGEST_TEXT, printed
from simpletuner.server.context import Context, InContext
from simpletuner.server.faults import Fault
from simpletuner.server.imagelists import can_undo, held_images, trashed
from simpletuner.server.shell import while_there
from simpletuner.server.work import CommandJob

router = APIRouter()

EDIT_TIMEOUT_S = 60.0
"""A regular expression can take forever."""

FolderText = Annotated[str, Field(max_length=LONGEST_TEXT)]
Names = Annotated[
    list[Annotated[str, Field(max_length=LONGEST_TEXT, pattern=r"^[^\r\n]+$")]], Field(max_length=1_000_000)
]
EditText = Annotated[str, Field(max_length=LONGEST_TEXT)]


class ImageList(BaseModel):
    """The images of a folder, subfolders included, that a search found."""

    path: str
    """Of the folder; in front of each name it makes the image's path."""
    total: int
    without_caption: int
    names: list[str]
    """By name, relative to the folder."""
    missing: list[str]
    """Those of `names` that have no caption."""
    trashed: int
    """Files that were deleted and can come back."""
    can_undo: bool
    """Whether the last change of captions can be taken back."""


class Partners(BaseModel):
    """The files of a set of references or masks, by the images that they belong to."""

    path: str
    """Of the folder; in front of each file it makes the file's path."""
    names: dict[str, list[str]]
    """Of each image that has any, relative to the folder, in the order in which training takes them."""


class LeftOut(BaseModel):
    """A file that stayed as it was."""

    name: str
    reason: str
    detail: str


class CaptionChangeShown(BaseModel):
    """A caption file before and after."""

    file: str
    images: list[str]
    before: str
    after: str


class EditedCaptions(BaseModel):
    """What a change of captions does, or did."""

    images: int
    changed: int
    emptied: int
    revision: str
    changes: list[CaptionChangeShown]
    """The first of them."""
    left_out: list[LeftOut]


class FolderRequest(RequestBody):
    """A request about images of a folder."""

    folder: FolderText


class CaptionsEdit(FolderRequest):
    """A change of the captions of `names`, null for all, as `simpletuner dataset captions` takes it."""

    names: Names | None = None
    find: EditText = ""
    replace: EditText = ""
    regex: bool = False
    prepend: EditText = ""
    append: EditText = ""
    whole: bool = False
    dry_run: bool = False
    revision: str = Field(default="", pattern=r"^[0-9a-f]{0,64}$")


class Deletion(FolderRequest):
    """Images to delete."""

    names: Names


class DeletedImages(BaseModel):
    """What was deleted."""

    images: int
    captions: int
    trash: str
    left_out: list[LeftOut]


class Undo(FolderRequest):
    """What to take back: the last change of captions, or the last deletion."""

    what: Literal["captions", "delete"]


class Undone(BaseModel):
    """How many files are as they were."""

    undone: int
    left_out: list[LeftOut]


@router.get("/images")
def images(
    here: InContext,
    folder: Annotated[str, Query(max_length=LONGEST_TEXT)],
    missing: bool = False,
    text: Annotated[str, Query(max_length=LONGEST_TEXT)] = "",
) -> ImageList:
    """The images below a folder; with `missing` those without a caption, with `text` those that name or say it."""
    path = here.roots.folder(folder)
    found = here.image_lists.search(path, holds=here.roots.holds, only_missing=missing, text=text)
    return ImageList(
        path=here.roots.shown(path),
        total=found.total,
        without_caption=len(found.without_caption),
        names=found.names,
        missing=[name for name in found.names if name in found.without_caption],
        trashed=trashed(path),
        can_undo=can_undo(path),
    )


@router.get("/images/partners")
def partners(
    here: InContext,
    folder: Annotated[str, Query(max_length=LONGEST_TEXT)],
    beside: Annotated[str, Query(max_length=LONGEST_TEXT)],
    numbered: bool = False,
) -> Partners:
    """Which files of the folder `beside` are references or masks of the images below a folder; with `numbered`, several
    of one image, as references may be."""
    names = held_images(here.roots.folder(folder), here.roots.holds).images
    path = here.roots.folder(beside)
    found = find_partners(names, held_images(path, here.roots.holds).images, is_numbered=numbered)
    paired = {name: [file for _, file in found.get(caption_key(name), ())] for name in names}
    return Partners(path=here.roots.shown(path), names={name: files for name, files in paired.items() if files})


@router.post("/images/captions")
async def edit_captions(edit: CaptionsEdit, request: Request, here: InContext) -> EditedCaptions:
    """Change captions together, or say what would change (`dry_run`): `simpletuner dataset captions`. With a
    `revision`, refuse where they are not what that dry run saw."""
    path = here.roots.folder(edit.folder)
    texts = {"find": edit.find, "replace": edit.replace, "prepend": edit.prepend, "append": edit.append}
    switches = {"regex": edit.regex, "whole": edit.whole, "dry-run": edit.dry_run}
    flags = [f"--{name}={text}" for name, text in (texts | {"revision": edit.revision}).items() if text]
    flags += [f"--{name}" for name, is_on in switches.items() if is_on]
    try:
        async with asyncio.timeout(EDIT_TIMEOUT_S):
            work = _dataset(here, "captions", path, edit.names, *flags)
            return EditedCaptions.model_validate(await (while_there(request, work) if edit.dry_run else work))
    except Fault as fault:
        if edit.revision and any(problem.found.startswith("--revision") for problem in fault.problems):
            raise Fault.of(409, "captions were changed since you looked", remedy="Look at the change again.") from None
        raise
    except TimeoutError:
        raise Fault.of(
            422, f"the change takes longer than {EDIT_TIMEOUT_S:.0f} s", "a simpler regular expression"
        ) from None


@router.post("/images/delete")
async def delete_images(deletion: Deletion, here: InContext) -> DeletedImages:
    """Move images and their captions to the folder's trash: `simpletuner dataset delete`."""
    path = here.roots.folder(deletion.folder)
    deleted = DeletedImages.model_validate(await _dataset(here, "delete", path, deletion.names, "--yes"))
    return deleted.model_copy(update={"trash": here.roots.shown(Path(deleted.trash))}) if deleted.trash else deleted


@router.post("/images/undo")
async def undo(wanted: Undo, here: InContext) -> Undone:
    """Take the last change of captions or the last deletion back."""
    path = here.roots.folder(wanted.folder)
    return Undone.model_validate(await _dataset(here, wanted.what, path, None, "--undo"))


@router.post("/images/empty-trash")
async def emptied_trash(wanted: FolderRequest, here: InContext) -> dict[str, int]:
    """Delete for good what was deleted from a folder before; answers how many files."""
    path = here.roots.folder(wanted.folder)
    return await _dataset(here, "delete", path, None, "--empty-trash", "--yes")


@router.post("/jobs/duplicates", status_code=202)
async def duplicates(wanted: FolderRequest, here: InContext) -> CommandJob:
    """Look for images that are there twice. The result is what `simpletuner dataset duplicates` prints."""
    path = here.roots.folder(wanted.folder)
    return here.jobs.start("duplicates", ["dataset", "duplicates", str(path), "--json", "--progress"])


def _is_there(folder: Path, name: str) -> bool:
    """Whether something lies at `name`, said without a command. The command decides whether it is an image."""
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and not name.startswith("/") and os.path.lexists(folder / name)


async def _dataset(here: Context, verb: str, folder: Path, names: Sequence[str] | None, *flags: str) -> dict[str, Any]:
    """What `simpletuner dataset VERB` prints about images of a folder.

    Raises:
        Fault: 422, one of `names` is no image of the folder, or it failed.
    """
    unknown = next((name for name in names or () if not _is_there(folder, name)), None)
    if unknown is not None:
        raise Fault.of(422, f"{unknown}: no such image", remedy="Load the list again.")
    with tempfile.TemporaryDirectory() as temporary:
        chosen = []
        if names is not None:
            listed = Path(temporary) / "names.txt"
            listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            chosen = [f"--names={listed}"]
        return printed(await here.shell.run("dataset", verb, str(folder), "--json", *chosen, *flags))
