"""The server's shared objects, which routes take as a dependency."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from simpletuner.server.imagelists import ImageLists
from simpletuner.server.meter import Meter
from simpletuner.server.pictures import Thumbnails
from simpletuner.server.roots import Roots
from simpletuner.server.runs import RunListCache
from simpletuner.server.sampler import SamplerProcess
from simpletuner.server.series import EventIndexes
from simpletuner.server.shell import SharedWork, Shell
from simpletuner.server.stream import Streams
from simpletuner.server.verdicts import Verdicts
from simpletuner.server.work import Jobs

CHECKS_AT_ONCE = 2


@dataclass(frozen=True)
class ServerContext:
    """The server's shared objects, created once by `create_app`."""

    roots: Roots
    shell: Shell
    jobs: Jobs
    sampler: SamplerProcess
    check_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CHECKS_AT_ONCE))
    """Limits how many draft checks run at once."""
    plan_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Limits memory plans to one at a time: each imports torch."""
    drafts: SharedWork = field(default_factory=SharedWork)
    """Checks and plans of drafts: identical requests at the same time share one command."""
    thumbnails: Thumbnails = field(default_factory=Thumbnails)
    """The most recently used thumbnails."""
    image_lists: ImageLists = field(default_factory=ImageLists)
    """Captions of the most recently listed folders."""
    write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a document's revision is compared and the document is replaced."""
    streams: Streams = field(default_factory=lambda: Streams(EventIndexes()))
    """The event streams of runs. At shutdown they are closed first, because the server waits for open connections."""
    run_list: RunListCache = field(default_factory=RunListCache)
    """The cached run list."""
    meter: Meter = field(default_factory=Meter)
    verdicts: Verdicts = field(default_factory=Verdicts)
    """Verification results of checkpoints."""

    @property
    def workspace(self) -> Path:
        return self.roots.workspace


def request_context(request: Request) -> ServerContext:
    """Return the context of the application that handles this request."""
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context


InContext = Annotated[ServerContext, Depends(request_context)]
