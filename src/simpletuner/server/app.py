"""The application: routes, faults and the page's files, put together."""

from importlib import import_module
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

import simpletuner
from simpletuner.server import faults
from simpletuner.server.context import Context
from simpletuner.server.roots import Roots
from simpletuner.server.shell import Shell

PAGE = Path(__file__).parent / "page"
SUBJECTS = ("about",)
"""Modules of `simpletuner.server.api`, each with a `router`."""


def create_app(roots: Roots) -> FastAPI:
    """The application over the files below `roots`."""
    app = FastAPI(
        title="simpletuner",
        version=simpletuner.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    app.state.context = Context(roots, Shell(roots.workspace))
    faults.install(app)
    for subject in SUBJECTS:
        app.include_router(import_module(f"simpletuner.server.api.{subject}").router, prefix="/api", tags=[subject])

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app
