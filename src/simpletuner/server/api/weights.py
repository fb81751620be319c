"""Weight files: inspected; LoRAs in other formats and merged, for download. The shell's commands do the work."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from simpletuner.base.errors import Problem
from simpletuner.base.sizes import GIB
from simpletuner.base.tensorfile import WEIGHT_FILES, is_weight_file
from simpletuner.config.options.lora import LoraFormat
from simpletuner.runs.layout import LORA_NAME
from simpletuner.server import uploads
from simpletuner.server.api.files import FILE_BODY, LONGEST_PATH, PathQuery, stream_into
from simpletuner.server.api.samples import ActingLora, lora_file
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import output, printed
from simpletuner.server.context import Context, InContext
from simpletuner.server.faults import Fault
from simpletuner.server.shell import Finished, while_there

router = APIRouter()

SCRATCH = Path(".simpletuner") / "files"
"""Below the workspace: files that are sent or received; each is deleted when its request ends."""
LARGEST_INSPECTED = 4 * GIB
"""Upload to be inspected."""
T = TypeVar("T")
MADE_FILE = "MADE FILE"
"""Stands for the path of what a command makes, among its words."""
SAID = "X-Said"
"""Header of a made file: the lines that the command printed, as a JSON list of strings."""
LONGEST_SAID = 400
"""Characters of each, so that any proxy passes the header on."""
_WEIGHTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/octet-stream": {}},
        "headers": {
            SAID: {
                "description": "The lines that the command printed about the file: a JSON list of strings.",
                "schema": {"type": "string"},
            }
        },
    }
}


class Inspection(BaseModel):
    """What `simpletuner inspect --json` prints."""

    path: str
    files: list[dict[str, Any]]


class InspectionLimit(BaseModel):
    """What an upload to be inspected may be."""

    suffixes: list[str]
    largest: int
    """Bytes."""


class ToConvert(RequestBody):
    """A LoRA, and the format in which it is wanted."""

    path: str = Field(max_length=LONGEST_PATH)
    """A .safetensors file, or a folder that holds one such as a checkpoint's."""
    format: LoraFormat
    allow_loss: bool = False
    """Convert even where a loader of this format drops layers, or gets them wrong."""


class ToMerge(RequestBody):
    """LoRAs to be merged into one."""

    loras: list[ActingLora] = Field(min_length=2, max_length=8)
    rank: int | None = Field(default=None, ge=1, le=4096)
    """By default the smallest that keeps 99 % of the energy."""
    format: LoraFormat = "diffusers"


class TemporaryDownload(FileResponse):
    """A file that is sent with the `lines` that a command printed about it, then deleted with the folder that `scratch`
    holds; also where the client goes away.
    """

    def __init__(self, path: Path, scratch: ExitStack, lines: Sequence[str]) -> None:
        headers = {SAID: json.dumps([line[:LONGEST_SAID] for line in lines])}
        super().__init__(path, headers=headers, media_type="application/octet-stream", filename=path.name)
        self._scratch = scratch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._scratch.close()


@router.get("/inspect")
async def inspect_here(path: PathQuery, request: Request, here: InContext) -> Inspection:
    """What a weight file holds."""
    real = here.roots.resolve(path)
    if not (real.is_file() and is_weight_file(real.name)):
        raise Fault.of(422, f"{path}: no weights are there", f"a file that ends in {' or '.join(WEIGHT_FILES)}")
    return Inspection.model_validate(
        await _answer(printed, here, request, "inspect", str(real), "--json") | {"path": path}
    )


@router.get("/inspect/rules")
def inspection_limit() -> InspectionLimit:
    """Which files can be sent to be inspected."""
    return InspectionLimit(suffixes=list(WEIGHT_FILES), largest=LARGEST_INSPECTED)


@router.put("/inspect", openapi_extra=FILE_BODY)
async def inspect_sent(
    name: Annotated[str, Query(max_length=LONGEST_PATH)], request: Request, here: InContext
) -> Inspection:
    """What the file that is sent holds. It is deleted when the answer is known."""
    try:
        uploads.check_name(name)
        if not is_weight_file(name):
            raise uploads.Refused(f"its name ends neither in {' nor in '.join(WEIGHT_FILES)}")
        with uploads.scratch_folder(here.workspace / SCRATCH) as folder:
            with (folder / name).open("xb") as file:
                await stream_into(request.stream(), file, LARGEST_INSPECTED)
            told = await _answer(printed, here, request, "inspect", str(folder / name), "--json", scratch=folder)
            return Inspection.model_validate(told | {"path": name})
    except uploads.Refused as reason:
        raise Fault.of(422, f"{name!a} is not taken: {reason}") from None


@router.post("/lora/convert", response_class=FileResponse, responses=_WEIGHTS)
async def convert(wanted: ToConvert, request: Request, here: InContext) -> TemporaryDownload:
    """A LoRA in another format: `simpletuner convert`. 422 names the layers that a loader of the format would drop."""
    source = lora_file(here.roots, wanted.path)
    stem = source.parent.name if source.name == LORA_NAME else source.stem
    flags = [f"--to={wanted.format}", *(["--allow-loss"] if wanted.allow_loss else [])]
    return await _made(here, request, f"{stem}-{wanted.format}.safetensors", "convert", str(source), MADE_FILE, *flags)


@router.post("/lora/merge", response_class=FileResponse, responses=_WEIGHTS)
async def merge(wanted: ToMerge, request: Request, here: InContext) -> TemporaryDownload:
    """Several LoRAs as one: `simpletuner merge`."""
    loras = [f"--lora={lora_file(here.roots, lora.path)}:{lora.strength}" for lora in wanted.loras]
    rank = [] if wanted.rank is None else [f"--rank={wanted.rank}"]
    name = f"merged-{wanted.format}.safetensors"
    return await _made(here, request, name, "merge", *loras, "--output", MADE_FILE, *rank, f"--to={wanted.format}")


async def _answer(
    read: Callable[[Finished], T], here: Context, request: Request, *words: str, scratch: Path | None = None
) -> T:
    """What `read`, which is `output` or `printed`, returns of a command.

    Raises:
        Fault: 422, the command failed. Its messages name files as the page does, and those in `scratch` by name alone.
    """
    try:
        return read(await while_there(request, here.shell.run(*words, request=request)))
    except Fault as fault:
        folders = [folder for folder in (scratch, here.workspace) if folder is not None]
        raise Fault(fault.status, *(_problem_without(folders, problem) for problem in fault.problems)) from None


def _without(folders: Sequence[Path], text: str) -> str:
    """`text` with files in `folders` by their names from there."""
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return text


def _problem_without(folders: Sequence[Path], problem: Problem) -> Problem:
    texts = {"found": problem.found, "expected": problem.expected, "remedy": problem.remedy}
    return replace(problem, **{name: _without(folders, text) for name, text in texts.items()})


async def _made(here: Context, request: Request, name: str, *words: str) -> TemporaryDownload:
    """The file `name` that a command writes, and what it prints about it. `MADE_FILE` among its `words` stands for the
    path.

    Raises:
        Fault: as `_answer`.
    """
    stack = ExitStack()
    folder = stack.enter_context(uploads.scratch_folder(here.workspace / SCRATCH))
    try:
        named = [str(folder / name) if word == MADE_FILE else word for word in words]
        said = await _answer(output, here, request, *named, scratch=folder)
        return TemporaryDownload(folder / name, stack, _without([folder, here.workspace], said).splitlines())
    except BaseException:
        stack.close()
        raise
