"""What commands print, in the two forms that they have in common: columns for people, JSON for programs."""

import json
from collections.abc import Sequence


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    """Rows in columns, each line after `indent`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(indent + line for line in lines)


def json_text(value: object) -> str:
    """The one JSON object that `--json` prints."""
    return json.dumps(value, indent=2, ensure_ascii=False)
