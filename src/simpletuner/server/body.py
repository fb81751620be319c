"""Bodies as they come in: never more of one in memory than it may hold."""

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from simpletuner.server.faults import Fault


class RequestBody(BaseModel):
    """The JSON object of a request: a key that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid")


async def read_body(request: Request, most: int) -> bytes:
    """The whole body.

    Raises:
        Fault: 413, it is larger than `most` bytes.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Fault.of(413, "what was sent is too large", f"at most {most:,} bytes")
        parts.append(part)
    return b"".join(parts)
