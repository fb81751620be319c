"""Environments and their documents, the options form, and checks and memory plans of drafts."""

import asyncio
import datetime
import json
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from simpletuner.base.errors import MemoryBudgetError
from simpletuner.config.flavours import DEFAULT_FLAVOUR
from simpletuner.config.form import Form, form
from simpletuner.server import environments as files
from simpletuner.server.body import RequestBody, read_body
from simpletuner.server.context import InContext, ServerContext
from simpletuner.server.documents import read_text, write_text
from simpletuner.server.drafts import Draft, draft_folder, with_real_paths, write_draft
from simpletuner.server.environments import NAME, NAME_OR_NONE, DocumentName, Environment, existing_environment
from simpletuner.server.faults import Fault, ProblemAnswer, problem_answer
from simpletuner.server.shell import printed_problems, until_disconnect
from simpletuner.server.work import from_json

router = APIRouter()

LARGEST_IMPORT = 4_000_000
"""Bytes of a zip to import."""

Name = Annotated[str, Query(pattern=NAME_OR_NONE)]


class EnvironmentSummary(BaseModel):
    """An environment as the list shows it."""

    name: str
    """Empty for the environment that `simpletuner train` reads by default."""
    path: str
    modified: str
    output_dir: str | None
    """As written in the config; null if it is missing or the config cannot be read."""
    has_datasets: bool


class Document(BaseModel):
    """One of an environment's files."""

    path: str
    text: str | None
    """Null if the file does not exist yet."""
    revision: str
    """Hash of the file's bytes; empty if the file does not exist yet."""


class Documents(BaseModel):
    """An environment's three files."""

    config: Document
    datasets: Document
    prompts: Document


class EnvironmentDetail(BaseModel):
    """An environment with its documents."""

    name: str
    documents: Documents


class DocumentEdit(RequestBody):
    """A document's new text, and the revision that it replaces."""

    text: str
    revision: str = Field(max_length=64)


class NewEnvironment(RequestBody):
    """A new environment: empty, a copy of the environment `source`, or made from the example `source`."""

    name: str = Field(pattern=NAME_OR_NONE)
    kind: Literal["empty", "copy", "example"]
    source: str = Field(default="", pattern=NAME_OR_NONE)


class EnvironmentRename(RequestBody):
    """An environment's current name and its new one."""

    name: str = Field(pattern=rf"^{NAME}$")
    new_name: str = Field(pattern=rf"^{NAME}$")


class DeletedEnvironment(BaseModel):
    """Removed files of an environment, and files left in its folder."""

    removed: list[str]
    left: list[str]


class DraftCheck(BaseModel):
    """The result of `simpletuner config check --json` for a draft."""

    problems: list[ProblemAnswer]
    notices: list[str]
    values: dict[str, Any]
    """The value of every option; empty if there are problems."""
    origins: dict[str, str]
    """The source of each value: default, file, environment or flag."""


class PlanRequest(Draft):
    """A draft and the machine to plan it for; null values stand for this machine."""

    vram_gib: float | None = Field(default=None, ge=0, le=1_000_000)
    ram_gib: float | None = Field(default=None, gt=0, le=1_000_000)
    gpus: int | None = Field(default=None, ge=1, le=1024)
    """Null means the draft's num_processes."""


@router.get("/form")
def the_form() -> Form:
    """Every option, as the form shows it."""
    return form()


@router.get("/environments")
def listed(context: InContext) -> list[EnvironmentSummary]:
    """The environments of the workspace."""
    return [_summary(environment) for environment in files.environments(context.roots)]


@router.get("/environment")
def detail(name: Name, context: InContext) -> EnvironmentDetail:
    """An environment with its documents as they are on disk."""
    return _detail(existing_environment(context.roots, name))


@router.put("/environment/document")
async def edit(name: Name, document: DocumentName, change: DocumentEdit, context: InContext) -> Document:
    """Replace a document; 409 if it changed since `revision`."""
    environment = existing_environment(context.roots, name)
    path = environment.document(document)
    await write_text(path, change.text, change.revision, context.write_lock)
    return _document(environment, document)


@router.post("/environments", status_code=201)
async def create(new: NewEnvironment, context: InContext) -> EnvironmentDetail:
    """Create an environment. The output_dir of a copy or example becomes `output/NAME`."""
    environment = Environment(context.roots, new.name)
    async with context.write_lock:
        await asyncio.to_thread(_make, environment, new, context)
    return _detail(environment)


@router.post("/environment/rename")
async def renamed(request: EnvironmentRename, context: InContext) -> EnvironmentDetail:
    """Rename an environment's folder."""
    environment = existing_environment(context.roots, request.name)
    new = Environment(context.roots, request.new_name)
    async with context.write_lock:
        await asyncio.to_thread(files.rename, environment, new)
    return _detail(new)


@router.delete("/environment")
async def deleted(name: Name, confirm: Name, context: InContext) -> DeletedEnvironment:
    """Delete an environment's files; `confirm` must repeat its name."""
    if confirm != name:
        raise Fault.of(422, f"confirm = {confirm!r}", f"the environment's name, {name!r}")
    environment = existing_environment(context.roots, name)
    async with context.write_lock:
        removed, remaining = await asyncio.to_thread(files.delete, environment)
    return DeletedEnvironment(
        removed=[context.roots.display_path(path) for path in removed],
        left=[context.roots.display_path(path) for path in remaining],
    )


@router.get("/environment/export", response_class=Response, responses={200: {"content": {"application/zip": {}}}})
def exported(name: Name, context: InContext) -> Response:
    """An environment's documents as a zip."""
    data = files.zipped(files.document_files(existing_environment(context.roots, name)))
    head = {"Content-Disposition": f'attachment; filename="{name or "config"}.zip"'}
    return Response(data, media_type="application/zip", headers=head)


@router.post(
    "/environment/import",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/zip": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": {"type": "object"}},
            },
        }
    },
)
async def imported(name: Name, request: Request, context: InContext) -> EnvironmentDetail:
    """Create an environment from a config.json, or from a zip that contains a config, such as `export` returns."""
    environment = Environment(context.roots, name)
    imported_files = files.unzipped(await read_body(request, LARGEST_IMPORT))
    async with context.write_lock:
        await asyncio.to_thread(files.make_environment, environment, imported_files)
    return _detail(environment)


@router.post("/check")
async def check(draft: Draft, request: Request, context: InContext) -> DraftCheck:
    """Every problem of a draft, by the same rules as in the CLI."""
    return await until_disconnect(request, context.drafts.of(f"check {draft!r}", lambda: _checked(draft, context)))


async def _checked(draft: Draft, context: ServerContext) -> DraftCheck:
    environment = Environment(context.roots, draft.name)
    with draft_folder() as folder:
        written = write_draft(draft, environment, folder)
        finished = await context.shell.run(
            "config", "check", "--json", *written.flags, extra_roots=(folder,), slots=context.check_slots
        )
    out = with_real_paths(finished, written)
    answer = _json_object(out.out)
    if answer is None:
        if out.exit_code == 0:
            raise Fault.of(500, "the check's output cannot be parsed")
        answer = {"problems": [problem_answer(problem).model_dump() for problem in printed_problems(out)]}
    result = DraftCheck(
        problems=[
            *map(problem_answer, written.problems),
            *(ProblemAnswer.model_validate(problem) for problem in answer.get("problems", [])),
        ],
        notices=answer.get("notices", []),
        values=answer.get("values", {}),
        origins=answer.get("origins", {}),
    )
    for problem in result.problems:
        problem.document = problem.document or written.document_of(problem)
    for option in written.overridden:
        if option in result.origins:
            result.origins[option] = "file"
    return result


@router.post("/plan")
async def plan(draft: PlanRequest, request: Request, context: InContext) -> dict[str, Any]:
    """The output of `simpletuner plan --json` for a draft; 422 if it cannot be planned."""
    return await until_disconnect(request, context.drafts.of(f"plan {draft!r}", lambda: _planned(draft, context)))


async def _planned(draft: PlanRequest, context: ServerContext) -> dict[str, Any]:
    environment = Environment(context.roots, draft.name)
    sizes = [
        *([] if draft.vram_gib is None else [f"--vram={draft.vram_gib:.10f}"]),
        *([] if draft.ram_gib is None else [f"--ram={draft.ram_gib:.10f}"]),
        *([] if draft.gpus is None else [f"--gpus={draft.gpus}"]),
    ]
    with draft_folder() as folder:
        written = write_draft(draft, environment, folder)
        if written.problems:
            raise Fault(422, *written.problems)
        finished = await context.shell.run(
            "plan", "--json", *sizes, *written.flags, extra_roots=(folder,), slots=context.plan_slots
        )
    out = with_real_paths(finished, written)
    memory_plan = _json_object(out.out)
    if out.exit_code in (0, MemoryBudgetError.exit_code) and memory_plan is not None:
        return memory_plan
    raise Fault(422, *printed_problems(out))


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = from_json(text)
    except ValueError:
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _make(environment: Environment, new: NewEnvironment, context: ServerContext) -> None:
    files.refuse_existing(environment)
    name = new.name or "config"
    if new.kind == "example":
        # Imports Pillow, which is slow.
        from simpletuner.examples.pictures import EXAMPLES, materialize

        created = files.detached_copy(files.example_files(new.source), name)
        if new.source in EXAMPLES:
            materialize(new.source, context.roots.resolve(f"datasets/{new.source}"))
    elif new.kind == "copy":
        created = files.detached_copy(files.document_files(existing_environment(context.roots, new.source)), name)
    else:
        options = {
            "model_type": "lora",
            "model_family": "flux2",
            "model_flavour": DEFAULT_FLAVOUR,
            "output_dir": f"output/{name}",
        }
        created = {"config.json": (json.dumps(options, indent=2) + "\n").encode()}
    files.make_environment(environment, created)


def _summary(environment: Environment) -> EnvironmentSummary:
    values = environment.values()
    output = values.get("output_dir")
    modified = datetime.datetime.fromtimestamp(environment.config.stat().st_mtime, datetime.UTC)
    return EnvironmentSummary(
        name=environment.name,
        path=environment.roots.display_path(environment.config),
        modified=modified.isoformat(timespec="milliseconds"),
        output_dir=output if isinstance(output, str) else None,
        has_datasets=_document(environment, "datasets").text is not None,
    )


def _detail(environment: Environment) -> EnvironmentDetail:
    config, datasets, prompts = (_document(environment, document) for document in files.DOCUMENTS)
    return EnvironmentDetail(
        name=environment.name, documents=Documents(config=config, datasets=datasets, prompts=prompts)
    )


def _document(environment: Environment, document: DocumentName) -> Document:
    try:
        path = environment.document(document)
    except Fault:
        # The config names a file that the page may not read. The other documents stay editable; writing this one
        # reports the problem.
        named_path = files.named_documents(environment.values()).get(document) or environment.roots.display_path(
            environment.config.with_name(files.FILE_NAMES[document])
        )
        return Document(path=named_path, text=None, revision="")
    text, revision = read_text(path)
    return Document(path=environment.roots.display_path(path), text=text, revision=revision)
