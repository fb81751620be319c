"""Request bodies: read with a size limit, so that none can fill host memory."""

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from simpletuner.server.faults import Fault


class RequestBody(BaseModel):
    """A request's JSON object; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the whole body.

    Raises:
        Fault: 413, the body is larger than `max_bytes`.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise Fault.of(413, "the request body is too large", f"at most {max_bytes:,} bytes")
        parts.append(part)
    return b"".join(parts)
