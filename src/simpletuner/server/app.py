"""The application: routes, faults and the page's files, put together."""

import contextlib
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

import simpletuner
from simpletuner.server import faults
from simpletuner.server.context import Context
from simpletuner.server.guard import Access, Guard
from simpletuner.server.roots import Roots
from simpletuner.server.shell import Shell
from simpletuner.server.work import Jobs

PAGE = Path(__file__).parent / "page"
SUBJECTS = ("about", "environments", "files", "jobs", "runs", "checkpoints", "queue", "samples")
"""Modules of `simpletuner.server.api`, each with a `router`."""


def create_app(roots: Roots, access: Access | None = None) -> FastAPI:
    """The application over the files below `roots`, for whom `access` lets in: by default this machine alone."""
    shell = Shell(roots.workspace)
    jobs = Jobs(shell)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await jobs.close()

    app = FastAPI(
        title="simpletuner",
        version=simpletuner.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
        # Every operation may be refused, and always in the same form.
        responses={"default": {"model": faults.FaultAnswer, "description": "What is wrong."}},
    )
    app.state.context = Context(roots, shell, jobs)
    app.add_middleware(Guard, access=access or Access())
    faults.install(app)
    for subject in SUBJECTS:
        app.include_router(import_module(f"simpletuner.server.api.{subject}").router, prefix="/api", tags=[subject])

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app
