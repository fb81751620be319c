"""The program's version, the machine and the folders that the page may access."""

import os

from fastapi import APIRouter
from pydantic import BaseModel

import simpletuner
from simpletuner.server.context import InContext
from simpletuner.server.environments import example_names
from simpletuner.server.meter import MachineMeter
from simpletuner.server.runs import OUTPUT

router = APIRouter()


class ServerInfo(BaseModel):
    """The program's version, the machine and the folders of the page."""

    version: str
    workspace: str
    roots: list[str]
    cores: int
    ram_bytes: int
    examples: list[str]
    """Bundled examples, to train or to copy."""


@router.get("/machine")
def machine(context: InContext) -> MachineMeter:
    """Used and free GPU memory, RAM and disk space."""
    return context.meter.read(context.workspace / OUTPUT)


@router.get("/about")
def about(context: InContext) -> ServerInfo:
    """The program's version, the machine and the folders of the page."""
    return ServerInfo(
        version=simpletuner.__version__,
        workspace=str(context.workspace),
        roots=[str(root) for root in context.roots.all],
        cores=os.cpu_count() or 1,
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        examples=example_names(),
    )
