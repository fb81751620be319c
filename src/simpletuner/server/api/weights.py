"""Inspect weight files; convert and merge LoRAs for download. The CLI's commands do the work."""

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
from simpletuner.server.api.samples import WeightedLora, lora_file
from simpletuner.server.body import RequestBody
from simpletuner.server.commands import output, printed_json
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.faults import Fault
from simpletuner.server.shell import Finished, until_disconnect

router = APIRouter()

SCRATCH = Path(".simpletuner") / "files"
"""Folder below the workspace for files in transfer; each is deleted when its request ends."""
LARGEST_INSPECTED = 4 * GIB
"""Bytes of an upload to inspect."""
T = TypeVar("T")
OUTPUT_FILE = "MADE FILE"
"""Placeholder, among a command's arguments, for the path of its output file."""
OUTPUT_LINES_HEADER = "X-Said"
"""Response header of an output file: the lines that the command printed, as a JSON list of strings."""
LONGEST_HEADER_LINE = 400
"""Characters per line, so that any proxy passes the header on."""
_FILE_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/octet-stream": {}},
        "headers": {
            OUTPUT_LINES_HEADER: {
                "description": "The lines that the command printed about the file: a JSON list of strings.",
                "schema": {"type": "string"},
            }
        },
    }
}


class Inspection(BaseModel):
    """The output of `simpletuner inspect --json`."""

    path: str
    files: list[dict[str, Any]]


class InspectionLimit(BaseModel):
    """Suffixes and size of an upload to inspect."""

    suffixes: list[str]
    largest: int
    """Bytes."""


class ConvertRequest(RequestBody):
    """A LoRA to convert, and the target format."""

    path: str = Field(max_length=LONGEST_PATH)
    """A .safetensors file, or a folder that contains one, such as a checkpoint's."""
    format: LoraFormat
    allow_loss: bool = False
    """Convert even if a loader of this format drops layers or misreads them."""


class MergeRequest(RequestBody):
    """LoRAs to merge into one."""

    loras: list[WeightedLora] = Field(min_length=2, max_length=8)
    rank: int | None = Field(default=None, ge=1, le=4096)
    """By default the smallest rank that keeps 99 % of the energy."""
    format: LoraFormat = "diffusers"


class TemporaryDownload(FileResponse):
    """Sends a file, with the lines that a command printed in a header. Afterwards, also if the client disconnects, it
    closes `scratch`, which deletes the file's folder.
    """

    def __init__(self, path: Path, scratch: ExitStack, lines: Sequence[str]) -> None:
        headers = {OUTPUT_LINES_HEADER: json.dumps([line[:LONGEST_HEADER_LINE] for line in lines])}
        super().__init__(path, headers=headers, media_type="application/octet-stream", filename=path.name)
        self._scratch = scratch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._scratch.close()


@router.get("/inspect")
async def inspect_here(path: PathQuery, request: Request, context: InContext) -> Inspection:
    """Inspect a weight file on this machine."""
    real = context.roots.resolve(path)
    if not (real.is_file() and is_weight_file(real.name)):
        raise Fault.of(422, f"{path}: there is no weight file", f"a file that ends in {' or '.join(WEIGHT_FILES)}")
    return Inspection.model_validate(
        await _command_result(printed_json, context, request, "inspect", str(real), "--json") | {"path": path}
    )


@router.get("/inspect/rules")
def inspection_limit() -> InspectionLimit:
    """The files that can be uploaded to inspect."""
    return InspectionLimit(suffixes=list(WEIGHT_FILES), largest=LARGEST_INSPECTED)


@router.put("/inspect", openapi_extra=FILE_BODY)
async def inspect_sent(
    name: Annotated[str, Query(max_length=LONGEST_PATH)], request: Request, context: InContext
) -> Inspection:
    """Inspect an uploaded file, which is deleted afterwards."""
    try:
        uploads.check_name(name)
        if not is_weight_file(name):
            raise uploads.RefusedUpload(f"its name ends neither in {' nor in '.join(WEIGHT_FILES)}")
        with uploads.scratch_folder(context.workspace / SCRATCH) as folder:
            with (folder / name).open("xb") as file:
                await stream_into(request.stream(), file, LARGEST_INSPECTED)
            answer = await _command_result(
                printed_json, context, request, "inspect", str(folder / name), "--json", scratch=folder
            )
            return Inspection.model_validate(answer | {"path": name})
    except uploads.RefusedUpload as reason:
        raise Fault.of(422, f"{name!a} is refused: {reason}") from None


@router.post("/lora/convert", response_class=FileResponse, responses=_FILE_RESPONSE)
async def convert(body: ConvertRequest, request: Request, context: InContext) -> TemporaryDownload:
    """Convert a LoRA to another format: `simpletuner convert`. 422 names the layers that its loader would drop."""
    source = lora_file(context.roots, body.path)
    stem = source.parent.name if source.name == LORA_NAME else source.stem
    flags = [f"--to={body.format}", *(["--allow-loss"] if body.allow_loss else [])]
    return await _output_file(
        context, request, f"{stem}-{body.format}.safetensors", "convert", str(source), OUTPUT_FILE, *flags
    )


@router.post("/lora/merge", response_class=FileResponse, responses=_FILE_RESPONSE)
async def merge(body: MergeRequest, request: Request, context: InContext) -> TemporaryDownload:
    """Merge LoRAs into one: `simpletuner merge`."""
    loras = [f"--lora={lora_file(context.roots, lora.path)}:{lora.strength}" for lora in body.loras]
    rank = [] if body.rank is None else [f"--rank={body.rank}"]
    name = f"merged-{body.format}.safetensors"
    return await _output_file(
        context, request, name, "merge", *loras, "--output", OUTPUT_FILE, *rank, f"--to={body.format}"
    )


async def _command_result(
    read: Callable[[Finished], T],
    context: ServerContext,
    request: Request,
    *arguments: str,
    scratch: Path | None = None,
) -> T:
    """Run a command and return its result, extracted by `read`: `output` or `printed_json`.

    Raises:
        Fault: 422, the command failed. Its messages show paths relative to the workspace, and files in
            `scratch` by name only.
    """
    try:
        return read(await until_disconnect(request, context.shell.run(*arguments, request=request)))
    except Fault as fault:
        folders = [folder for folder in (scratch, context.workspace) if folder is not None]
        raise Fault(fault.status, *(_problem_without(folders, problem) for problem in fault.problems)) from None


def _without(folders: Sequence[Path], text: str) -> str:
    """Make the paths in `text` relative to `folders`."""
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return text


def _problem_without(folders: Sequence[Path], problem: Problem) -> Problem:
    texts = {"found": problem.found, "expected": problem.expected, "remedy": problem.remedy}
    return replace(problem, **{name: _without(folders, text) for name, text in texts.items()})


async def _output_file(context: ServerContext, request: Request, name: str, *arguments: str) -> TemporaryDownload:
    """Run a command that writes the file `name`, and return it as a download. `OUTPUT_FILE` among the `arguments`
    stands for its path.

    Raises:
        Fault: as `_command_result`.
    """
    stack = ExitStack()
    folder = stack.enter_context(uploads.scratch_folder(context.workspace / SCRATCH))
    try:
        filled = [str(folder / name) if argument == OUTPUT_FILE else argument for argument in arguments]
        printed_text = await _command_result(output, context, request, *filled, scratch=folder)
        return TemporaryDownload(folder / name, stack, _without([folder, context.workspace], printed_text).splitlines())
    except BaseException:
        stack.close()
        raise
