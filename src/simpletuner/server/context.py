"""What every route may ask for."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from simpletuner.server.imagelists import ImageLists
from simpletuner.server.meter import Meter
from simpletuner.server.pictures import Thumbnails
from simpletuner.server.roots import Roots
from simpletuner.server.runs import Glances
from simpletuner.server.sampler import SamplerProcess
from simpletuner.server.series import Indexes
from simpletuner.server.shell import SharedWork, Shell
from simpletuner.server.stream import Streams
from simpletuner.server.verdicts import Verdicts
from simpletuner.server.work import Jobs

CHECKS_AT_ONCE = 2


@dataclass(frozen=True)
class Context:
    """The server's own things, made once by `create_app`."""

    roots: Roots
    shell: Shell
    jobs: Jobs
    sampler: SamplerProcess
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CHECKS_AT_ONCE))
    """Held by each check of a draft while it runs."""
    planning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Held by a memory plan, which brings torch."""
    drafts: SharedWork = field(default_factory=SharedWork)
    """The checks and plans of drafts: the same one that is asked for twice at a time is made once."""
    thumbnails: Thumbnails = field(default_factory=Thumbnails)
    """The last small pictures."""
    image_lists: ImageLists = field(default_factory=ImageLists)
    """The captions of the last folders that were listed."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held between looking at a document's revision and replacing it."""
    streams: Streams = field(default_factory=lambda: Streams(Indexes()))
    """The runs that are followed; to be closed before the server waits for its clients."""
    glances: Glances = field(default_factory=Glances)
    """The runs of the list, as they were read last."""
    meter: Meter = field(default_factory=Meter)
    verdicts: Verdicts = field(default_factory=Verdicts)
    """Of the checkpoints that were verified."""

    @property
    def workspace(self) -> Path:
        return self.roots.workspace


def context(request: Request) -> Context:
    """The context of the application that answers this request."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


InContext = Annotated[Context, Depends(context)]
