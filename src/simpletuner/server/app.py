"""The FastAPI application: API routes, error responses and the page's static files."""

import contextlib
from collections.abc import AsyncIterator
from importlib import import_module
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES
from starlette.types import ASGIApp, Receive, Scope, Send

import simpletuner
from simpletuner.server import faults
from simpletuner.server.context import ServerContext
from simpletuner.server.guard import Access, Guard
from simpletuner.server.peer import is_loopback
from simpletuner.server.roots import Roots
from simpletuner.server.sampler import IDLE_S, SamplerProcess
from simpletuner.server.shell import Shell
from simpletuner.server.work import Jobs

PAGE = Path(__file__).parent / "page"
SUBJECTS = (
    "about",
    "environments",
    "recipes",
    "files",
    "images",
    "jobs",
    "runs",
    "checkpoints",
    "queue",
    "samples",
    "weights",
)
"""Modules of `simpletuner.server.api`, each with a `router`."""

CURVES_PATH = "/api/run/series"
NOT_COMPRESSED = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/octet-stream")
"""Content types that are not compressed: images and weights do not shrink, and events must not wait."""


class Compression(GZipMiddleware):
    """gzip at its fastest level. A loopback client gets curves uncompressed: 100,000 steps are 8 MB, which reach it
    sooner than gzip finishes."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, compresslevel=1, exclude_content_types=NOT_COMPRESSED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_loopback_curves = (
            scope["type"] == "http" and scope["path"] == CURVES_PATH and is_loopback(scope.get("client"))
        )
        await (self.app if is_loopback_curves else super().__call__)(scope, receive, send)


def create_app(roots: Roots, access: Access | None = None, *, sampler_idle_s: float = IDLE_S) -> FastAPI:
    """Create the application that serves the files below `roots` to the clients that `access` admits, by default
    those on this machine only. The sampler process ends after `sampler_idle_s` seconds without work."""
    shell = Shell(roots.workspace, roots.extra_roots)
    jobs = Jobs(shell)
    sampler = SamplerProcess(shell, sampler_idle_s)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await jobs.close()
        await sampler.end()

    app = FastAPI(
        title="simpletuner",
        version=simpletuner.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=lifespan,
        # Any operation may fail; all failures have the same form.
        responses={"default": {"model": faults.FaultAnswer, "description": "The problems."}},
    )
    app.state.context = ServerContext(roots, shell, jobs, sampler)
    app.add_middleware(Compression)
    app.add_middleware(Guard, access=access or Access())
    faults.install(app)
    for subject in SUBJECTS:
        app.include_router(import_module(f"simpletuner.server.api.{subject}").router, prefix="/api", tags=[subject])

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app
