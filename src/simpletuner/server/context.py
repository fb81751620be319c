"""What every route may ask for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from simpletuner.server.roots import Roots
from simpletuner.server.shell import Shell


@dataclass(frozen=True)
class Context:
    """The server's own things, made once by `create_app`."""

    roots: Roots
    shell: Shell

    @property
    def workspace(self) -> Path:
        return self.roots.workspace


def context(request: Request) -> Context:
    """The context of the application that answers this request."""
    found = request.app.state.context
    assert isinstance(found, Context)
    return found


InContext = Annotated[Context, Depends(context)]
