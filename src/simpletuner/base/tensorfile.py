"""safetensors files whose bytes follow from their content."""

import json


def with_sorted_metadata(data: bytes) -> bytes:
    """The safetensors file `data` with the fields of its header's metadata in alphabetical order.

    The library writes them in a random order, so the same tensors would have another hash each time. Format
    (https://github.com/safetensors/safetensors#format): eight bytes of length, little-endian; a JSON header,
    filled up with spaces; the tensors, at places counted from the header's end.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
