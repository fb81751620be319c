"""`simpletuner server`: the page."""

from pathlib import Path

from simpletuner.server.app import create_app
from simpletuner.server.roots import Roots


def run(arguments: list[str]) -> int:
    """Serve the page until it is interrupted."""
    import uvicorn

    uvicorn.run(create_app(Roots(Path.cwd())), host="127.0.0.1", port=8001, log_level="warning")
    return 0
