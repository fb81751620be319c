"""`simpletuner sample --serve`: requests from standard input, what comes of them on standard output, a line each."""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner.base.console import input_lines, is_output_read, say
from simpletuner.base.errors import ConfigError, MemoryBudgetError, UserError
from simpletuner.cli.drawing import Sampler
from simpletuner.cli.main import NOT_READ
from simpletuner.cli.progress import progress_of_steps
from simpletuner.cli.sample import SampleConfig, wanted_loras
from simpletuner.runs.samplers import known_as_sampler

_LOOK_EVERY_S = 0.2

SampleRequest = Mapping[str, Any]
"""Options of `sample` by name; and `id`, which comes back with all that is said about it."""


class _Cancelled(Exception):
    """The request that is drawn is not wanted any more."""


def serve(read: Callable[[SampleRequest], SampleConfig]) -> int:
    """Draw for each request on standard input, until it ends. Returns the exit code, 0.

    A line is a JSON object: a request, or `{"cancel": ID}`, which takes effect between two sampler steps. Of each
    request the lines that tell of it end with one of the events done, failed and cancelled.

    Args:
        read: makes a configuration of a request.

    Raises:
        BrokenPipeError: nobody reads standard output.
    """
    inbox = _Inbox()
    sampler = Sampler()
    with known_as_sampler(Path.cwd(), os.environ):
        threading.Thread(target=inbox.fill, daemon=True).start()
        _tell("ready")
        while (request := inbox.requests.get()) is not None:
            _draw(sampler, inbox, request, read)
    return 0


def _draw(
    sampler: Sampler, inbox: "_Inbox", request: SampleRequest, read: Callable[[SampleRequest], SampleConfig]
) -> None:
    request_id = request.get("id")

    def report(done: int, total: int) -> None:
        if inbox.is_cancelled(request_id):
            raise _Cancelled
        _tell("progress", request_id, **progress_of_steps(done, total))

    try:
        if inbox.is_cancelled(request_id):
            raise _Cancelled
        config = read({name: value for name, value in request.items() if name != "id"})
        for drawing in sampler.draw(config, wanted_loras(config), report):
            _tell("picture", request_id, **drawing.described)
    except _Cancelled:
        _tell("cancelled", request_id)
    except UserError as error:
        is_memory = isinstance(error, MemoryBudgetError)
        _tell_failure(request_id, error)
        del error
        if is_memory:
            sampler.release()
    else:
        _tell("done", request_id)


def _tell(event: str, request_id: object = None, **fields: Any) -> None:
    say(json.dumps({"event": event, "id": request_id, **fields}, ensure_ascii=False))


def _tell_failure(request_id: object, error: UserError) -> None:
    _tell("failed", request_id, exit_code=error.exit_code, problems=[each.parts for each in error.problems])


class _Inbox:
    """What arrived on standard input."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[SampleRequest | None] = queue.SimpleQueue()
        """In their order; None at the end."""
        self._cancelled: set[str] = set()

    def is_cancelled(self, request_id: object) -> bool:
        return str(request_id) in self._cancelled

    def fill(self) -> None:
        """Read standard input to its end. Then, end the process once nobody reads what it prints: whoever asked is
        gone, and what is still drawn would keep the GPU.
        """
        for line in input_lines():
            if line.strip():
                self._take(line)
        self.requests.put(None)
        while is_output_read():
            time.sleep(_LOOK_EVERY_S)
        os._exit(NOT_READ)

    def _take(self, line: str) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            _tell_failure(None, ConfigError.of("a line on standard input is no JSON object", '{"prompt": ["…"]}'))
        elif "cancel" in request:
            self._cancelled.add(str(request["cancel"]))
        else:
            self.requests.put(request)
