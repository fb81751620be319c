"""`simpletuner sample --serve`: read requests from standard input, print events on standard output, as JSON lines."""

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
from simpletuner.cli.main import NOT_READ
from simpletuner.cli.progress import progress_of_steps
from simpletuner.cli.sample import SampleConfig, requested_loras
from simpletuner.cli.sampler import Sampler
from simpletuner.runs.samplers import registered_as_sampler

_POLL_OUTPUT_EVERY_S = 0.2

SampleRequest = Mapping[str, Any]
"""Options of `sample` by name, and `id`, which every event about the request repeats."""


class _Cancelled(Exception):
    """The current request was cancelled."""


def serve(read: Callable[[SampleRequest], SampleConfig]) -> int:
    """Generate images for each request on standard input until it ends. Returns the exit code, 0.

    Each line is a JSON object: a request, or `{"cancel": ID}`, which takes effect between two sampler steps. The last
    event of a request is done, failed or cancelled.

    Args:
        read: converts a request into a configuration.

    Raises:
        BrokenPipeError: the reader of standard output is gone.
    """
    inbox = _Inbox()
    sampler = Sampler()
    with registered_as_sampler(Path.cwd(), os.environ):
        threading.Thread(target=inbox.fill, daemon=True).start()
        _print_event("ready")
        while (request := inbox.requests.get()) is not None:
            _sample(sampler, inbox, request, read)
    return 0


def _sample(
    sampler: Sampler, inbox: "_Inbox", request: SampleRequest, read: Callable[[SampleRequest], SampleConfig]
) -> None:
    request_id = request.get("id")

    def report(done: int, total: int) -> None:
        if inbox.is_cancelled(request_id):
            raise _Cancelled
        _print_event("progress", request_id, **progress_of_steps(done, total))

    try:
        if inbox.is_cancelled(request_id):
            raise _Cancelled
        config = read({name: value for name, value in request.items() if name != "id"})
        for image in sampler.sample(config, requested_loras(config), report):
            _print_event("picture", request_id, **image.fields)
    except _Cancelled:
        _print_event("cancelled", request_id)
    except UserError as error:
        is_out_of_memory = isinstance(error, MemoryBudgetError)
        _print_failure(request_id, error)
        del error
        if is_out_of_memory:
            sampler.release()
    else:
        _print_event("done", request_id)


def _print_event(event: str, request_id: object = None, **fields: Any) -> None:
    say(json.dumps({"event": event, "id": request_id, **fields}, ensure_ascii=False))


def _print_failure(request_id: object, error: UserError) -> None:
    _print_event("failed", request_id, exit_code=error.exit_code, problems=[each.parts for each in error.problems])


class _Inbox:
    """The requests and cancellations that arrive on standard input."""

    def __init__(self) -> None:
        self.requests: queue.SimpleQueue[SampleRequest | None] = queue.SimpleQueue()
        """The requests in the order of their arrival; None marks the end of standard input."""
        self._cancelled: set[str] = set()

    def is_cancelled(self, request_id: object) -> bool:
        return str(request_id) in self._cancelled

    def fill(self) -> None:
        """Read standard input to its end, then end the process as soon as nobody reads standard output: the client is
        gone, and an unfinished image would occupy the GPU.
        """
        for line in input_lines():
            if line.strip():
                self._take(line)
        self.requests.put(None)
        while is_output_read():
            time.sleep(_POLL_OUTPUT_EVERY_S)
        os._exit(NOT_READ)

    def _take(self, line: str) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            _print_failure(None, ConfigError.of("a line on standard input is not a JSON object", '{"prompt": ["…"]}'))
        elif "cancel" in request:
            self._cancelled.add(str(request["cancel"]))
        else:
            self.requests.put(request)
