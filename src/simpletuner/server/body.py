"""Bodies as they come in: never more of one in memory than it may hold."""

from fastapi import Request

from simpletuner.server.faults import Fault


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
