"""Environments and their documents; the form that they are edited by; a draft checked, and its memory planned."""

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
from simpletuner.server.context import Context, InContext
from simpletuner.server.documents import read_text, write_text
from simpletuner.server.drafts import Draft, draft_folder, drafted, without_traces
from simpletuner.server.environments import NAME, NAME_OR_NONE, DocumentName, Environment, existing
from simpletuner.server.faults import Fault, ProblemAnswer, answered
from simpletuner.server.shell import problems_told, while_there
from simpletuner.server.work import from_json

router = APIRouter()

LARGEST_IMPORT = 4_000_000
"""Bytes of a zip that is imported."""

Name = Annotated[str, Query(pattern=NAME_OR_NONE)]


class EnvironmentSummary(BaseModel):
    """One line of the list."""

    name: str
    """Empty for what `simpletuner train` reads unasked."""
    path: str
    modified: str
    output_dir: str | None
    """As it stands in the config; null where it is left out or the config cannot be read."""
    has_datasets: bool


class Document(BaseModel):
    """One of an environment's files."""

    path: str
    text: str | None
    """Null where there is no such file yet."""
    revision: str
    """Changes with every byte; empty where there is no such file yet."""


class Documents(BaseModel):
    """An environment's three files."""

    config: Document
    datasets: Document
    prompts: Document


class EnvironmentDetail(BaseModel):
    """An environment."""

    name: str
    documents: Documents


class Edit(RequestBody):
    """A document's new text, and the revision of the text that was edited."""

    text: str
    revision: str = Field(max_length=64)


class New(RequestBody):
    """A new environment: empty, a copy of environment `source`, or example `source`."""

    name: str = Field(pattern=NAME_OR_NONE)
    kind: Literal["empty", "copy", "example"]
    source: str = Field(default="", pattern=NAME_OR_NONE)


class Renaming(RequestBody):
    """An environment's name and its new one."""

    name: str = Field(pattern=rf"^{NAME}$")
    new_name: str = Field(pattern=rf"^{NAME}$")


class Deleted(BaseModel):
    """What was removed of an environment, and what lies in its folder still."""

    removed: list[str]
    left: list[str]


class Check(BaseModel):
    """What `simpletuner config check --json` says of a draft."""

    problems: list[ProblemAnswer]
    notices: list[str]
    values: dict[str, Any]
    """Every option's value; empty where there are problems."""
    origins: dict[str, str]
    """Where each comes from: default, file, environment or flag."""


class PlanRequest(Draft):
    """A draft and the machine that it is planned for; null is this one."""

    vram_gib: float | None = Field(default=None, ge=0, le=1_000_000)
    ram_gib: float | None = Field(default=None, gt=0, le=1_000_000)
    gpus: int | None = Field(default=None, ge=1, le=1024)
    """Null is as many as the draft's num_processes."""


@router.get("/form")
def the_form() -> Form:
    """Every option as a form asks for it."""
    return form()


@router.get("/environments")
def listed(here: InContext) -> list[EnvironmentSummary]:
    """All environments of the workspace."""
    return [_summary(environment) for environment in files.environments(here.roots)]


@router.get("/environment")
def detail(name: Name, here: InContext) -> EnvironmentDetail:
    """An environment with its documents as they are on disk now."""
    return _detail(existing(here.roots, name))


@router.put("/environment/document")
async def edit(name: Name, document: DocumentName, change: Edit, here: InContext) -> Document:
    """Replace a document, unless it was changed since `revision`: then 409."""
    environment = existing(here.roots, name)
    path = environment.document(document)
    await write_text(path, change.text, change.revision, here.writing)
    return _document(environment, document)


@router.post("/environments", status_code=201)
async def create(new: New, here: InContext) -> EnvironmentDetail:
    """Make an environment. A copy and an example get a run directory of their own, `output/NAME`."""
    environment = Environment(here.roots, new.name)
    async with here.writing:
        await asyncio.to_thread(_make, environment, new, here)
    return _detail(environment)


@router.post("/environment/rename")
async def renamed(request: Renaming, here: InContext) -> EnvironmentDetail:
    """Rename an environment: its folder gets the new name."""
    environment = existing(here.roots, request.name)
    new = Environment(here.roots, request.new_name)
    async with here.writing:
        await asyncio.to_thread(files.rename, environment, new)
    return _detail(new)


@router.delete("/environment")
async def deleted(name: Name, confirm: Name, here: InContext) -> Deleted:
    """Remove an environment's own files. `confirm` is its name once more."""
    if confirm != name:
        raise Fault.of(422, f"confirm = {confirm!r}", f"the environment's name, {name!r}")
    environment = existing(here.roots, name)
    async with here.writing:
        removed, left = await asyncio.to_thread(files.delete, environment)
    return Deleted(removed=[here.roots.shown(path) for path in removed], left=[here.roots.shown(path) for path in left])


@router.get("/environment/export", response_class=Response, responses={200: {"content": {"application/zip": {}}}})
def exported(name: Name, here: InContext) -> Response:
    """An environment's documents as a zip."""
    data = files.zipped(files.files_of(existing(here.roots, name)))
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
async def imported(name: Name, request: Request, here: InContext) -> EnvironmentDetail:
    """Make an environment of a config.json or of a zip with one in it, as `export` gives it."""
    environment = Environment(here.roots, name)
    sent = files.unzipped(await read_body(request, LARGEST_IMPORT))
    async with here.writing:
        await asyncio.to_thread(files.make_environment, environment, sent)
    return _detail(environment)


@router.post("/check")
async def check(draft: Draft, request: Request, here: InContext) -> Check:
    """Every problem of a draft, by the same rules as the shell."""
    return await while_there(request, here.drafts.of(f"check {draft!r}", lambda: _checked(draft, here)))


async def _checked(draft: Draft, here: Context) -> Check:
    environment = Environment(here.roots, draft.name)
    with draft_folder() as folder:
        written = drafted(draft, environment, folder)
        finished = await here.shell.run(
            "config", "check", "--json", *written.flags, also=(folder,), turns=here.checking
        )
    out = without_traces(finished, written)
    told = _object(out.out)
    if told is None:
        if out.exit_code == 0:
            raise Fault.of(500, "the check gave no answer that can be read")
        told = {"problems": [answered(problem).model_dump() for problem in problems_told(out)]}
    found = Check(
        problems=[
            *map(answered, written.problems),
            *(ProblemAnswer.model_validate(problem) for problem in told.get("problems", [])),
        ],
        notices=told.get("notices", []),
        values=told.get("values", {}),
        origins=told.get("origins", {}),
    )
    for problem in found.problems:
        problem.document = problem.document or written.document_of(problem)
    for option in written.overridden:
        if option in found.origins:
            found.origins[option] = "file"
    return found


@router.post("/plan")
async def plan(draft: PlanRequest, request: Request, here: InContext) -> dict[str, Any]:
    """What `simpletuner plan --json` says of a draft; 422 where it cannot be planned."""
    return await while_there(request, here.drafts.of(f"plan {draft!r}", lambda: _planned(draft, here)))


async def _planned(draft: PlanRequest, here: Context) -> dict[str, Any]:
    environment = Environment(here.roots, draft.name)
    sizes = [
        *([] if draft.vram_gib is None else [f"--vram={draft.vram_gib:.10f}"]),
        *([] if draft.ram_gib is None else [f"--ram={draft.ram_gib:.10f}"]),
        *([] if draft.gpus is None else [f"--gpus={draft.gpus}"]),
    ]
    with draft_folder() as folder:
        written = drafted(draft, environment, folder)
        if written.problems:
            raise Fault(422, *written.problems)
        finished = await here.shell.run("plan", "--json", *sizes, *written.flags, also=(folder,), turns=here.planning)
    out = without_traces(finished, written)
    told = _object(out.out)
    if out.exit_code in (0, MemoryBudgetError.exit_code) and told is not None:
        return told
    raise Fault(422, *problems_told(out))


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = from_json(text)
    except ValueError:
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _make(environment: Environment, new: New, here: Context) -> None:
    files.refuse_existing(environment)
    name = new.name or "config"
    if new.kind == "example":
        # Brings Pillow, which an idle server does without.
        from simpletuner.examples.pictures import EXAMPLES, materialize

        made = files.on_its_own(files.example_files(new.source), name)
        if new.source in EXAMPLES:
            materialize(new.source, here.roots.resolve(f"datasets/{new.source}"))
    elif new.kind == "copy":
        made = files.on_its_own(files.files_of(existing(here.roots, new.source)), name)
    else:
        options = {
            "model_type": "lora",
            "model_family": "flux2",
            "model_flavour": DEFAULT_FLAVOUR,
            "output_dir": f"output/{name}",
        }
        made = {"config.json": (json.dumps(options, indent=2) + "\n").encode()}
    files.make_environment(environment, made)


def _summary(environment: Environment) -> EnvironmentSummary:
    values = environment.values()
    output = values.get("output_dir")
    changed = datetime.datetime.fromtimestamp(environment.config.stat().st_mtime, datetime.UTC)
    return EnvironmentSummary(
        name=environment.name,
        path=environment.roots.shown(environment.config),
        modified=changed.isoformat(timespec="milliseconds"),
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
        # The config names a file that the page may not read: the rest can still be edited, and writing it says why not.
        named = files.named_by(environment.values()).get(document) or environment.roots.shown(
            environment.config.with_name(files.FILE_NAMES[document])
        )
        return Document(path=named, text=None, revision="")
    text, revision = read_text(path)
    return Document(path=environment.roots.shown(path), text=text, revision=revision)
