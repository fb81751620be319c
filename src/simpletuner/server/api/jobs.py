"""Start the long commands that scan and cache an environment's images; report and cancel jobs of any kind."""

from fastapi import APIRouter
from pydantic import Field

from simpletuner.server.body import RequestBody
from simpletuner.server.context import InContext
from simpletuner.server.environments import NAME_OR_NONE, selecting_flags
from simpletuner.server.work import CommandJob

router = APIRouter()


class JobRequest(RequestBody):
    """The environment to work on."""

    environment: str = Field(pattern=NAME_OR_NONE)


@router.post("/jobs/scan", status_code=202)
async def scan_datasets(request: JobRequest, context: InContext) -> CommandJob:
    """Scan the images of an environment. The job's result is the output of `simpletuner dataset scan`."""
    arguments = [
        "dataset",
        "scan",
        "--json",
        "--pictures",
        "--progress",
        *selecting_flags(context.roots, request.environment),
    ]
    return context.jobs.start("scan", arguments)


@router.post("/jobs/cache", status_code=202)
async def cache(request: JobRequest, context: InContext) -> CommandJob:
    """Encode an environment's captions and images. The job's result is the output of `simpletuner dataset cache`."""
    arguments = ["dataset", "cache", "--json", "--progress", *selecting_flags(context.roots, request.environment)]
    return context.jobs.start("cache", arguments)


@router.get("/jobs/{job_id}")
async def job(job_id: str, context: InContext) -> CommandJob:
    """A job's progress and outcome."""
    return context.jobs.job(job_id)


@router.delete("/jobs/{job_id}")
async def cancel(job_id: str, context: InContext) -> CommandJob:
    """Cancel a job; responds once its command has ended."""
    return await context.jobs.cancel(job_id)
