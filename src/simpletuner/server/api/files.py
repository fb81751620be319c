"""Folders, images and their captions, and uploads into a folder."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, IMAGE_SUFFIXES
from simpletuner.base.storage import is_utf8_name
from simpletuner.server import uploads
from simpletuner.server.api.environments import DocumentEdit
from simpletuner.server.body import RequestBody
from simpletuner.server.context import InContext
from simpletuner.server.documents import permissions_are_reported, read_text, write_text
from simpletuner.server.faults import Fault
from simpletuner.server.pictures import ImageVersion
from simpletuner.server.roots import Roots
from simpletuner.server.thumbnails import WIDTHS, picture_type
from simpletuner.server.uploads import (
    LARGEST_FILE,
    LARGEST_TEXT,
    LARGEST_ZIP,
    MIB,
    UPLOAD_IMAGE_SUFFIXES,
    UPLOAD_TEXT_SUFFIXES,
    ZIP,
    RefusedUpload,
    UploadOutcome,
)

router = APIRouter()

NAMED_AT_MOST = 200
"""Images whose names a folder's response lists."""
LONGEST_PATH = 4096
FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
"""OpenAPI request body of a route that accepts a raw file."""

PathQuery = Annotated[str, Query(max_length=LONGEST_PATH)]


class Folder(BaseModel):
    """A subfolder."""

    name: str
    path: str


class FolderView(BaseModel):
    """A folder and its direct content."""

    path: str
    parent: str | None
    """Null if it lies outside the folders of the page."""
    folders: list[Folder]
    pictures: int
    captions: int
    names: list[str]
    """Paths of the first images, sorted by name."""


class NewFolder(RequestBody):
    """A folder to create in `path`."""

    path: str = Field(max_length=LONGEST_PATH)
    name: str = Field(max_length=LONGEST_PATH)


class RefusedFile(BaseModel):
    """A file that was refused, and why."""

    name: str
    reason: str


class Upload(BaseModel):
    """Files that an upload saved and refused."""

    saved: list[str]
    refused: list[RefusedFile]


class UploadRules(BaseModel):
    """File types and sizes in bytes that an upload accepts, so that clients can refuse others early."""

    suffixes: list[str]
    largest: dict[str, int]
    """By suffix; "" stands for all others."""


class Caption(BaseModel):
    """The text of an image's caption file."""

    text: str | None
    """Null if the file does not exist yet."""
    revision: str
    """Hash of the file's bytes; empty if the file does not exist yet."""


@router.get("/folders")
def folders(context: InContext, path: PathQuery = ".") -> FolderView:
    """A folder; `.` is the workspace. Leaves out hidden entries and links that lead outside the page's folders."""
    return _view(context.roots.folder(path), context.roots)


@router.post("/folder", status_code=201)
def make_folder(new: NewFolder, context: InContext) -> FolderView:
    """Create a folder."""
    parent = context.roots.folder(new.path)
    try:
        uploads.check_name(new.name)
    except RefusedUpload as reason:
        raise Fault.of(422, f"{new.name!r} cannot name a folder: {reason}") from None
    created = parent / new.name
    if os.path.lexists(created):
        raise Fault.of(409, f"{new.name} exists already")
    with permissions_are_reported(created):
        created.mkdir()
    return _view(created, context.roots)


@router.get("/upload")
def upload_rules() -> UploadRules:
    """The files that an upload accepts."""
    largest = {"": LARGEST_FILE, ZIP: LARGEST_ZIP, **dict.fromkeys(UPLOAD_TEXT_SUFFIXES, LARGEST_TEXT)}
    return UploadRules(suffixes=sorted(UPLOAD_IMAGE_SUFFIXES | UPLOAD_TEXT_SUFFIXES | {ZIP}), largest=largest)


@router.put("/upload", openapi_extra=FILE_BODY)
async def upload(
    folder: PathQuery, name: Annotated[str, Query(max_length=LONGEST_PATH)], request: Request, context: InContext
) -> Upload:
    """Save an image, a text, or the images and texts of a zip in a folder. Existing files are not overwritten."""
    target = context.roots.folder(folder)
    try:
        uploads.check_name(name)
        outcome = await _received(request, target, name, context.roots)
    except RefusedUpload as reason:
        outcome = UploadOutcome(refused=[(name.encode(errors="backslashreplace").decode(), str(reason))])
    return Upload(
        saved=[context.roots.display_path(path) for path in outcome.saved],
        refused=[RefusedFile(name=refused, reason=reason) for refused, reason in outcome.refused],
    )


@router.get(
    "/picture",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, 304: {"description": "The client's copy is current."}},
)
def picture(
    path: PathQuery,
    request: Request,
    context: InContext,
    width: Annotated[int | None, Query(ge=WIDTHS[0], le=WIDTHS[1])] = None,
    mask: bool = False,
) -> Response:
    """An image file, or with `width` an upright JPEG of it, at most that wide. Behind transparent parts the JPEG is
    white, for a `mask` black.
    """
    version = ImageVersion.of(_image(context.roots, path, UPLOAD_IMAGE_SUFFIXES))
    headers = {"ETag": version.tag(width), "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if width is not None:
        return Response(context.thumbnails.of(version, width, is_mask=mask), media_type="image/jpeg", headers=headers)
    kind = picture_type(version.path)
    if kind is None:
        raise Fault.of(422, f"{path} is not an image that browsers show", remedy="Request it with a width.")
    return FileResponse(version.path, media_type=kind, headers=headers)


@router.get("/caption")
def caption(path: PathQuery, context: InContext) -> Caption:
    """The caption of the image at `path`."""
    text, revision = read_text(_caption_of(context.roots, path))
    return Caption(text=text, revision=revision)


@router.put("/caption")
async def write_caption(path: PathQuery, change: DocumentEdit, context: InContext) -> Caption:
    """Write an image's caption; 409 if it changed since `revision`."""
    caption_file = _caption_of(context.roots, path)
    await write_text(caption_file, change.text, change.revision, context.write_lock)
    text, revision = await asyncio.to_thread(read_text, caption_file)
    return Caption(text=text, revision=revision)


def _view(folder: Path, roots: Roots) -> FolderView:
    subfolders: list[Folder] = []
    pictures: list[str] = []
    captions = 0
    with permissions_are_reported(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    uploads.sweep_uploads(folder, (entry.name for entry in entries if entry.name.startswith(".")))
    for entry in entries:
        if entry.name.startswith(".") or not is_utf8_name(entry.name):
            continue
        if entry.is_dir():
            if not entry.is_symlink() or roots.contains(Path(entry.path).resolve()):
                subfolders.append(Folder(name=entry.name, path=roots.display_path(Path(entry.path))))
            continue
        suffix = Path(entry.name).suffix.lower()
        captions += suffix in UPLOAD_TEXT_SUFFIXES
        if suffix in UPLOAD_IMAGE_SUFFIXES:
            pictures.append(entry.name)
    parent = folder.parent
    return FolderView(
        path=roots.display_path(folder),
        parent=roots.display_path(parent) if folder not in roots.all and roots.contains(parent.resolve()) else None,
        folders=subfolders,
        pictures=len(pictures),
        captions=captions,
        names=[roots.display_path(folder / name) for name in pictures[:NAMED_AT_MOST]],
    )


def _image(roots: Roots, text: str, suffixes: frozenset[str]) -> Path:
    """Return the path of the image that `text` names, with one of `suffixes`.

    Raises:
        Fault: 403, it lies outside; 404, there is no such file; 422, it has another suffix.
    """
    path = roots.resolve(text)
    if path.suffix.lower() not in suffixes:
        raise Fault.of(422, f"{text} is not an image")
    if not path.is_file():
        raise Fault.of(404, f"there is no image {text}")
    return path


def _caption_of(roots: Roots, text: str) -> Path:
    """Return the path of an image's caption, which need not exist.

    Raises:
        Fault: 403, it or its image lies outside; 404, there is no such image; 422, it has another suffix.
    """
    _image(roots, text, IMAGE_SUFFIXES)
    # Beside the given name, not beside a link's target: a linked image has its own caption.
    unresolved = Path(os.path.normpath(roots.workspace / Path(text).expanduser()))
    candidates = [unresolved.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return roots.resolve(str(next(filter(os.path.lexists, candidates), candidates[0])))


async def _received(request: Request, folder: Path, name: str, roots: Roots) -> UploadOutcome:
    suffix = uploads.upload_suffix(name)
    with file_errors_reported(folder / name), permissions_are_reported(folder), uploads.part_beside(folder) as part:
        with part.open("wb") as file:
            await stream_into(request.stream(), file, LARGEST_ZIP if suffix == ZIP else LARGEST_FILE)
        if suffix == ZIP:
            return await asyncio.to_thread(uploads.unpack, part, name, folder, roots)
        await asyncio.to_thread(uploads.check_content, part, suffix)
        uploads.finish_part(part, folder / name)
    return UploadOutcome(saved=[folder / name])


async def stream_into(parts: AsyncIterator[bytes], file: IO[bytes], max_bytes: int) -> None:
    """Write the received parts to `file`, one MiB at a time.

    Raises:
        RefusedUpload: there are more than `max_bytes`.
    """
    size, buffer = 0, bytearray()
    async for part in parts:
        size += len(part)
        if size > max_bytes:
            raise RefusedUpload(f"more than {max_bytes:,} bytes")
        buffer += part
        if len(buffer) >= MIB:
            await asyncio.to_thread(file.write, bytes(buffer))
            buffer.clear()
    await asyncio.to_thread(file.write, bytes(buffer))
