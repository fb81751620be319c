"""Error responses of the API: a status and the problems, as the CLI would print them."""

import errno
import os
from typing import Self

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from simpletuner.base.errors import DiskError, Problem, UserError
from simpletuner.base.files import DISK, FILE_FAULTS, PERMISSION
from simpletuner.server.headers import SECURITY

CLIENT_CLOSED_REQUEST = 499
STATUS_OF: dict[type[UserError], int] = {DiskError: 507}
"""HTTP status for each of the CLI's errors; 422 for those not listed."""
STATUS_OF_SYSTEM = {
    **dict.fromkeys(FILE_FAULTS | {errno.EILSEQ}, 422),
    **dict.fromkeys(PERMISSION, 403),
    **dict.fromkeys(DISK, 507),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN), 503),
    errno.ENOENT: 404,
}
"""HTTP status for each errno; an errno not listed counts as a bug (500)."""


class ProblemAnswer(BaseModel):
    """A problem."""

    found: str
    expected: str = ""
    remedy: str = ""
    key: str = ""
    """The option that the problem is about, if any."""
    document: str = ""
    """config, datasets or prompts, if the problem is about one of an environment's files."""
    text: str
    """Found, expected and remedy as one text."""


class FaultAnswer(BaseModel):
    """The body of every error response."""

    problems: list[ProblemAnswer]


class Fault(Exception):
    """Ends a request with `status` and the problems."""

    def __init__(self, status: int, *problems: Problem) -> None:
        self.status = status
        self.problems = problems
        super().__init__(status, *map(str, problems))

    @classmethod
    def of(cls, status: int, finding: str, expected: str = "", remedy: str = "") -> Self:
        """A fault with a single problem."""
        return cls(status, Problem(finding, expected, remedy))


class ClientGone(Exception):
    """The client closed the connection before the response."""


def problem_answer(problem: Problem) -> ProblemAnswer:
    """Convert a problem to its API form."""
    # UTF-8 cannot encode the unpaired surrogates that a request may hold.
    parts = {name: part.encode(errors="backslashreplace").decode() for name, part in problem.parts.items()}
    return ProblemAnswer(**parts)


def install(app: FastAPI) -> None:
    """Register handlers that turn faults, the CLI's errors and invalid requests into responses of one form."""

    def response(status: int, *problems: Problem) -> JSONResponse:
        body = FaultAnswer(problems=[problem_answer(problem) for problem in problems])
        return JSONResponse(body.model_dump(), status_code=status)

    @app.exception_handler(Fault)
    async def fault(_request: Request, error: Fault) -> JSONResponse:
        return response(error.status, *error.problems)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGone)
    async def gone(_request: Request, _error: Exception) -> JSONResponse:
        return response(CLIENT_CLOSED_REQUEST, Problem("the client closed the connection"))

    @app.exception_handler(UserError)
    async def user_error(_request: Request, error: UserError) -> JSONResponse:
        return response(STATUS_OF.get(type(error), 422), *error.problems)

    @app.exception_handler(OSError)
    async def system(_request: Request, error: OSError) -> JSONResponse:
        if error.errno not in STATUS_OF_SYSTEM:
            raise error
        # Without the path: the request may not have named it, and the response must not reveal it.
        return response(STATUS_OF_SYSTEM[error.errno], Problem(f"the system reports: {os.strerror(error.errno)}"))

    @app.exception_handler(Exception)
    async def bug(_request: Request, _error: Exception) -> JSONResponse:
        # Starlette raises the error again after this response, so the server's terminal shows the traceback.
        answer = response(
            500, Problem("the server failed", remedy="This is a bug: the server's terminal shows the traceback.")
        )
        # This response bypasses the guard, which adds these headers to all others.
        answer.headers.update(SECURITY)
        return answer

    @app.exception_handler(RequestValidationError)
    async def wrong_shape(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            Problem(f"{'.'.join(map(str, fault['loc'][1:])) or 'request'}: {fault['msg']}") for fault in error.errors()
        ]
        return response(422, *problems)

    @app.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        answer = response(error.status_code, Problem(str(error.detail)))
        answer.headers.update(error.headers or {})  # Allow, for a wrong method
        return answer
