"""List and search the images of a folder; edit their captions together; delete and restore them."""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from simpletuner.base.imagefiles import caption_key, find_partners, trashed_files
from simpletuner.config.datasets import MAX_REFERENCES
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import LONGEST_TEXT, printed_json
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.imagelists import allowed_images, can_undo
from simpletuner.server.shell import until_disconnect
from simpletuner.server.work import CommandJob

router = APIRouter()

EDIT_TIMEOUT_S = 60.0
"""Time limit for an edit: a regular expression can take forever."""

FolderText = Annotated[str, Field(max_length=LONGEST_TEXT)]
Names = Annotated[
    list[Annotated[str, Field(max_length=LONGEST_TEXT, pattern=r"^[^\r\n]+$")]], Field(max_length=1_000_000)
]
EditText = Annotated[str, Field(max_length=LONGEST_TEXT)]


class ImageList(BaseModel):
    """The images of a folder and its subfolders that match a search."""

    path: str
    """The folder's path, to prefix to each name."""
    total: int
    without_caption: int
    names: list[str]
    """Sorted, relative to the folder."""
    missing: list[str]
    """Those of `names` without a caption."""
    trashed: int
    """Deleted files that can be restored."""
    can_undo: bool
    """Whether the last caption edit can be undone."""


class Partners(BaseModel):
    """The files of a reference or mask dataset, by the image they belong to."""

    path: str
    """The folder's path, to prefix to each file."""
    names: dict[str, list[str]]
    """Files of each image that has any, relative to the folder, in the order training uses them."""


class SkippedFile(BaseModel):
    """A file that was not changed, and why."""

    name: str
    reason: str
    detail: str


class CaptionChangeShown(BaseModel):
    """A caption file before and after an edit."""

    file: str
    images: list[str]
    before: str
    after: str


class EditedCaptions(BaseModel):
    """The result, or the preview, of a caption edit."""

    images: int
    changed: int
    emptied: int
    revision: str
    changes: list[CaptionChangeShown]
    """The first changes."""
    left_out: list[SkippedFile]


class FolderRequest(RequestBody):
    """A request about the images of a folder."""

    folder: FolderText


class CaptionsEdit(FolderRequest):
    """An edit of the captions of `names` (null: of all), with the flags of `simpletuner dataset captions`."""

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
    partners: list[FolderText] = Field(default=[], max_length=MAX_REFERENCES + 1)
    """Folders of references or masks. Those of the images are deleted too, unless another image uses them."""


class DeletedImages(BaseModel):
    """How many files were deleted, and the trash folder that holds the images and captions."""

    images: int
    captions: int
    partners: int = 0
    """References and masks, which are in the trash of their own folder."""
    trash: str
    left_out: list[SkippedFile]


class UndoRequest(FolderRequest):
    """A request to undo the last caption edit or the last deletion."""

    what: Literal["captions", "delete"]


class UndoResult(BaseModel):
    """How many files were restored, and how many are left to restore."""

    undone: int
    remaining: int = 0
    """Deleted files still in the trash: those in `left_out`, and those of earlier deletions. 0 for captions."""
    left_out: list[SkippedFile]


@router.get("/images")
def images(
    context: InContext,
    folder: Annotated[str, Query(max_length=LONGEST_TEXT)],
    missing: bool = False,
    text: Annotated[str, Query(max_length=LONGEST_TEXT)] = "",
) -> ImageList:
    """The images below a folder: with `missing` those without a caption, with `text` those whose name or caption
    contains it."""
    path = context.roots.folder(folder)
    matches = context.image_lists.search(path, is_allowed=context.roots.contains, only_missing=missing, text=text)
    return ImageList(
        path=context.roots.display_path(path),
        total=matches.total,
        without_caption=len(matches.without_caption),
        names=matches.names,
        missing=[name for name in matches.names if name in matches.without_caption],
        trashed=trashed_files(path),
        can_undo=can_undo(path),
    )


@router.get("/images/partners")
def partners(
    context: InContext,
    folder: Annotated[str, Query(max_length=LONGEST_TEXT)],
    beside: Annotated[str, Query(max_length=LONGEST_TEXT)],
    numbered: bool = False,
) -> Partners:
    """The files of the folder `beside` that are references or masks of the images below `folder`; with `numbered` an
    image may have several, as with references."""
    names = allowed_images(context.roots.folder(folder), context.roots.contains).images
    path = context.roots.folder(beside)
    partner_files = find_partners(names, allowed_images(path, context.roots.contains).images, is_numbered=numbered)
    paired = {name: [file for _, file in partner_files.get(caption_key(name), ())] for name in names}
    return Partners(
        path=context.roots.display_path(path), names={name: files for name, files in paired.items() if files}
    )


@router.post("/images/captions")
async def edit_captions(edit: CaptionsEdit, request: Request, context: InContext) -> EditedCaptions:
    """Edit captions together, or preview the edit (`dry_run`): `simpletuner dataset captions`. With a `revision`, 409
    if the captions changed since the dry run that returned it."""
    path = context.roots.folder(edit.folder)
    texts = {"find": edit.find, "replace": edit.replace, "prepend": edit.prepend, "append": edit.append}
    switches = {"regex": edit.regex, "whole": edit.whole, "dry-run": edit.dry_run}
    flags = [f"--{name}={text}" for name, text in (texts | {"revision": edit.revision}).items() if text]
    flags += [f"--{name}" for name, is_on in switches.items() if is_on]
    try:
        async with asyncio.timeout(EDIT_TIMEOUT_S):
            work = _run_dataset_command(context, "captions", path, edit.names, *flags)
            return EditedCaptions.model_validate(await (until_disconnect(request, work) if edit.dry_run else work))
    except Fault as fault:
        if edit.revision and any(problem.found.startswith("--revision") for problem in fault.problems):
            raise Fault.of(409, "captions changed since the preview", remedy="Preview the edit again.") from None
        raise
    except TimeoutError:
        raise Fault.of(
            422, f"the edit takes longer than {EDIT_TIMEOUT_S:.0f} s", "a simpler regular expression"
        ) from None


@router.post("/images/delete")
async def delete_images(deletion: Deletion, context: InContext) -> DeletedImages:
    """Move images and their captions to the folder's trash, and references and masks to those of their folders:
    `simpletuner dataset delete`."""
    path = context.roots.folder(deletion.folder)
    partners = [f"--partners={context.roots.folder(text)}" for text in deletion.partners]
    result = await _run_dataset_command(context, "delete", path, deletion.names, "--yes", *partners)
    deleted = DeletedImages.model_validate(result)
    return (
        deleted.model_copy(update={"trash": context.roots.display_path(Path(deleted.trash))})
        if deleted.trash
        else deleted
    )


@router.post("/images/undo")
async def undo(request: UndoRequest, context: InContext) -> UndoResult:
    """Undo the last caption edit or the last deletion; to undo earlier deletions, repeat it while files remain."""
    path = context.roots.folder(request.folder)
    return UndoResult.model_validate(await _run_dataset_command(context, request.what, path, None, "--undo"))


@router.post("/images/empty-trash")
async def emptied_trash(request: FolderRequest, context: InContext) -> dict[str, int]:
    """Empty a folder's trash; the response counts the files."""
    path = context.roots.folder(request.folder)
    return await _run_dataset_command(context, "delete", path, None, "--empty-trash", "--yes")


@router.post("/jobs/duplicates", status_code=202)
async def duplicates(request: FolderRequest, context: InContext) -> CommandJob:
    """Find duplicate images. The job's result is the output of `simpletuner dataset duplicates`."""
    path = context.roots.folder(request.folder)
    return context.jobs.start("duplicates", ["dataset", "duplicates", str(path), "--json", "--progress"])


def _exists_in(folder: Path, name: str) -> bool:
    """Whether `name` exists, checked without running a command. The command decides whether it is an image."""
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and not name.startswith("/") and os.path.lexists(folder / name)


async def _run_dataset_command(
    context: ServerContext, verb: str, folder: Path, names: Sequence[str] | None, *flags: str
) -> dict[str, Any]:
    """Return the JSON output of `simpletuner dataset VERB` about images of a folder.

    Raises:
        Fault: 422, one of `names` does not exist in the folder, or the command failed.
    """
    unknown = next((name for name in names or () if not _exists_in(folder, name)), None)
    if unknown is not None:
        raise Fault.of(422, f"{unknown}: no such image", remedy="Load the list again.")
    with tempfile.TemporaryDirectory() as temporary:
        names_flag = []
        if names is not None:
            names_file = Path(temporary) / "names.txt"
            names_file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            names_flag = [f"--names={names_file}"]
        return printed_json(await context.shell.run("dataset", verb, str(folder), "--json", *names_flag, *flags))
