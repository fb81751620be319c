"""Folders, pictures and their captions; what is uploaded into them."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field

from simpletuner.base.files import file_errors_reported
from simpletuner.base.imagefiles import CAPTION_SUFFIXES, PICTURE_SUFFIXES
from simpletuner.base.storage import is_utf8_name
from simpletuner.server import uploads
from simpletuner.server.api.environments import Edit
from simpletuner.server.body import RequestBody
from simpletuner.server.context import InContext
from simpletuner.server.documents import permissions_are_reported, read_text, write_text
from simpletuner.server.faults import Fault
from simpletuner.server.pictures import Version
from simpletuner.server.roots import Roots
from simpletuner.server.thumbnails import WIDTHS, picture_type
from simpletuner.server.uploads import (
    LARGEST_FILE,
    LARGEST_TEXT,
    LARGEST_ZIP,
    MIB,
    PICTURES,
    TEXTS,
    ZIP,
    Outcome,
    Refused,
)

router = APIRouter()

NAMED_AT_MOST = 200
"""Pictures that a folder's answer names."""
LONGEST_PATH = 4096
FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}
"""What OpenAPI says of a route that takes a file as it is."""

PathQuery = Annotated[str, Query(max_length=LONGEST_PATH)]


class Folder(BaseModel):
    """A folder inside another."""

    name: str
    path: str


class FolderView(BaseModel):
    """A folder and what lies directly in it."""

    path: str
    parent: str | None
    """Null where it lies outside the folders of the page."""
    folders: list[Folder]
    pictures: int
    captions: int
    names: list[str]
    """Paths of the first pictures, by name."""


class NewFolder(RequestBody):
    """A folder to be made in `path`."""

    path: str = Field(max_length=LONGEST_PATH)
    name: str = Field(max_length=LONGEST_PATH)


class RefusedFile(BaseModel):
    """A file that was not taken."""

    name: str
    reason: str


class Upload(BaseModel):
    """What came of an upload."""

    saved: list[str]
    refused: list[RefusedFile]


class UploadRules(BaseModel):
    """What an upload takes, so that nothing else is sent. Sizes in bytes."""

    suffixes: list[str]
    largest: dict[str, int]
    """By suffix; "" is of all others."""


class Caption(BaseModel):
    """The text beside a picture."""

    text: str | None
    """Null where there is none yet."""
    revision: str
    """Changes with every byte; empty where there is none yet."""


@router.get("/folders")
def folders(here: InContext, path: PathQuery = ".") -> FolderView:
    """A folder; `.` is the workspace. Hidden ones are left out, and links that lead out of the page's folders."""
    return _view(here.roots.folder(path), here.roots)


@router.post("/folder", status_code=201)
def make_folder(new: NewFolder, here: InContext) -> FolderView:
    """Make a folder."""
    parent = here.roots.folder(new.path)
    try:
        uploads.check_name(new.name)
    except Refused as reason:
        raise Fault.of(422, f"{new.name!r} cannot name a folder: {reason}") from None
    made = parent / new.name
    if os.path.lexists(made):
        raise Fault.of(409, f"there is a {new.name} in it")
    with permissions_are_reported(made):
        made.mkdir()
    return _view(made, here.roots)


@router.get("/upload")
def upload_rules() -> UploadRules:
    """Which files an upload takes."""
    largest = {"": LARGEST_FILE, ZIP: LARGEST_ZIP, **dict.fromkeys(TEXTS, LARGEST_TEXT)}
    return UploadRules(suffixes=sorted(PICTURES | TEXTS | {ZIP}), largest=largest)


@router.put("/upload", openapi_extra=FILE_BODY)
async def upload(
    folder: PathQuery, name: Annotated[str, Query(max_length=LONGEST_PATH)], request: Request, here: InContext
) -> Upload:
    """Take a picture, a text or a zip of them into a folder. Nothing that is there is overwritten."""
    into = here.roots.folder(folder)
    try:
        uploads.check_name(name)
        outcome = await _taken(request, into, name, here.roots)
    except Refused as reason:
        outcome = Outcome(refused=[(name.encode(errors="backslashreplace").decode(), str(reason))])
    return Upload(
        saved=[here.roots.shown(path) for path in outcome.saved],
        refused=[RefusedFile(name=refused, reason=reason) for refused, reason in outcome.refused],
    )


@router.get(
    "/picture",
    response_class=Response,
    responses={200: {"content": {"image/*": {}}}, 304: {"description": "As it was."}},
)
def picture(
    path: PathQuery,
    request: Request,
    here: InContext,
    width: Annotated[int | None, Query(ge=WIDTHS[0], le=WIDTHS[1])] = None,
    mask: bool = False,
) -> Response:
    """A picture, or with `width` a JPEG of it, upright and at most so wide. The JPEG of a `mask` is black where the
    file is transparent; that of another picture is white.
    """
    version = Version.of(_image(here.roots, path, PICTURES))
    headers = {"ETag": version.tag(width), "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if width is not None:
        return Response(here.thumbnails.of(version, width, is_mask=mask), media_type="image/jpeg", headers=headers)
    kind = picture_type(version.path)
    if kind is None:
        raise Fault.of(422, f"{path} is no picture that a browser shows", remedy="Ask for it with a width.")
    return FileResponse(version.path, media_type=kind, headers=headers)


@router.get("/caption")
def caption(path: PathQuery, here: InContext) -> Caption:
    """The caption beside the picture at `path`."""
    text, revision = read_text(_caption_of(here.roots, path))
    return Caption(text=text, revision=revision)


@router.put("/caption")
async def write_caption(path: PathQuery, change: Edit, here: InContext) -> Caption:
    """Write the caption beside a picture, unless it was changed since `revision`: then 409."""
    beside = _caption_of(here.roots, path)
    await write_text(beside, change.text, change.revision, here.writing)
    text, revision = await asyncio.to_thread(read_text, beside)
    return Caption(text=text, revision=revision)


def _view(folder: Path, roots: Roots) -> FolderView:
    inside: list[Folder] = []
    pictures: list[str] = []
    captions = 0
    with permissions_are_reported(folder):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    uploads.sweep_uploads(folder, (entry.name for entry in entries if entry.name.startswith(".")))
    for entry in entries:
        if entry.name.startswith(".") or not is_utf8_name(entry.name):
            continue
        if entry.is_dir():
            if not entry.is_symlink() or roots.holds(Path(entry.path).resolve()):
                inside.append(Folder(name=entry.name, path=roots.shown(Path(entry.path))))
            continue
        suffix = Path(entry.name).suffix.lower()
        captions += suffix in TEXTS
        if suffix in PICTURES:
            pictures.append(entry.name)
    parent = folder.parent
    return FolderView(
        path=roots.shown(folder),
        parent=roots.shown(parent) if folder not in roots.all and roots.holds(parent.resolve()) else None,
        folders=inside,
        pictures=len(pictures),
        captions=captions,
        names=[roots.shown(folder / name) for name in pictures[:NAMED_AT_MOST]],
    )


def _image(roots: Roots, text: str, suffixes: frozenset[str]) -> Path:
    """The picture that `text` names, by one of `suffixes`.

    Raises:
        Fault: 403, outside; 404, none; 422, no picture by its name.
    """
    path = roots.resolve(text)
    if path.suffix.lower() not in suffixes:
        raise Fault.of(422, f"{text} is no picture")
    if not path.is_file():
        raise Fault.of(404, f"there is no picture {text}")
    return path


def _caption_of(roots: Roots, text: str) -> Path:
    """Where the caption of a picture lies, or would.

    Raises:
        Fault: 403, it or its picture lies outside; 404, no picture; 422, no picture by its name.
    """
    _image(roots, text, PICTURE_SUFFIXES)
    # Beside the picture as it is named: a link to a picture has a caption of its own.
    named = Path(os.path.normpath(roots.workspace / Path(text).expanduser()))
    beside = [named.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    return roots.resolve(str(next(filter(os.path.lexists, beside), beside[0])))


async def _taken(request: Request, folder: Path, name: str, roots: Roots) -> Outcome:
    suffix = uploads.kind_of(name)
    with file_errors_reported(folder / name), permissions_are_reported(folder), uploads.part_beside(folder) as part:
        with part.open("wb") as file:
            await stream_into(request.stream(), file, LARGEST_ZIP if suffix == ZIP else LARGEST_FILE)
        if suffix == ZIP:
            return await asyncio.to_thread(uploads.unpack, part, name, folder, roots)
        await asyncio.to_thread(uploads.check_content, part, suffix)
        uploads.name_part(part, folder / name)
    return Outcome(saved=[folder / name])


async def stream_into(parts: AsyncIterator[bytes], file: IO[bytes], most: int) -> None:
    """Write what comes in, a MiB at a time.

    Raises:
        Refused: it is more than `most` bytes.
    """
    size, held = 0, bytearray()
    async for part in parts:
        size += len(part)
        if size > most:
            raise Refused(f"more than {most:,} bytes")
        held += part
        if len(held) >= MIB:
            await asyncio.to_thread(file.write, bytes(held))
            held.clear()
    await asyncio.to_thread(file.write, bytes(held))
