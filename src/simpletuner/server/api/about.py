"""What this server is and where it works."""

import os

from fastapi import APIRouter
from pydantic import BaseModel

import simpletuner
from simpletuner.server.context import InContext
from simpletuner.server.environments import example_names
from simpletuner.server.meter import MachineMeter
from simpletuner.server.runs import OUTPUT

router = APIRouter()


class About(BaseModel):
    """The program, the machine and the folders."""

    version: str
    workspace: str
    roots: list[str]
    cores: int
    ram_bytes: int
    examples: list[str]
    """Those that come with the program, to be trained or copied."""


@router.get("/machine")
def machine(here: InContext) -> MachineMeter:
    """GPUs, RAM and disk: what is in use and what is left."""
    return here.meter.read(here.workspace / OUTPUT)


@router.get("/about")
def about(here: InContext) -> About:
    """The program, the machine and the folders."""
    return About(
        version=simpletuner.__version__,
        workspace=str(here.workspace),
        roots=[str(root) for root in here.roots.all],
        cores=os.cpu_count() or 1,
        ram_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        examples=example_names(),
    )
