"""Long commands: scanning and caching the pictures of an environment; looking after jobs of any kind."""

from fastapi import APIRouter
from pydantic import Field

from simpletuner.server.body import RequestBody
from simpletuner.server.context import InContext
from simpletuner.server.environments import NAME_OR_NONE, selecting
from simpletuner.server.work import CommandJob

router = APIRouter()


class JobRequest(RequestBody):
    """What to work on."""

    environment: str = Field(pattern=NAME_OR_NONE)


@router.post("/jobs/scan", status_code=202)
async def scan_datasets(request: JobRequest, here: InContext) -> CommandJob:
    """Look at the pictures of an environment. The result is what `simpletuner dataset scan` prints."""
    arguments = ["dataset", "scan", "--json", "--pictures", "--progress", *selecting(here.roots, request.environment)]
    return here.jobs.start("scan", arguments)


@router.post("/jobs/cache", status_code=202)
async def cache(request: JobRequest, here: InContext) -> CommandJob:
    """Encode the captions and pictures of an environment. The result is what `simpletuner dataset cache` prints."""
    arguments = ["dataset", "cache", "--json", "--progress", *selecting(here.roots, request.environment)]
    return here.jobs.start("cache", arguments)


@router.get("/jobs/{job_id}")
async def job(job_id: str, here: InContext) -> CommandJob:
    """How far a job is, and what came of it."""
    return here.jobs.job(job_id)


@router.delete("/jobs/{job_id}")
async def cancel(job_id: str, here: InContext) -> CommandJob:
    """Cancel a job; the answer comes when its command has ended."""
    return await here.jobs.cancel(job_id)
