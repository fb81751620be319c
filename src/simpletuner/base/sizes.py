"""Parse and format sizes and durations in human-readable units."""

import re

GIB = 1024**3

_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a text such as "2GB", "500 MiB", "1.5g" or "1024". Units are powers of 1024.

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(count: float) -> str:
    """Format `count` bytes: "512 B", "15.7 MiB", "60.02 GiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit, digits in (("KiB", 1), ("MiB", 1)):
        count /= 1024
        if count < 1024:
            return f"{count:.{digits}f} {unit}"
    return f"{count / 1024:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Format `seconds` with three significant digits: "0.4 ms", "84 ms", "2.53 s"."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def format_duration(seconds: float) -> str:
    """Format `seconds`: "0.4 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
