"""docs/events.md, made from the event classes: `python -m simpletuner.runs.reference --write | --check`."""

import sys
from pathlib import Path
from typing import Any

from simpletuner.runs.events import EVENTS, Event, Picture

TARGET = Path("docs/events.md")

_HEAD = """# Events of a run

<!-- Made from src/simpletuner/runs/events.py by `python -m simpletuner.runs.reference --write`. -->

`RUN/events.jsonl` is append-only: one JSON object a line, UTF-8. Every line carries

| key | type | meaning |
|---|---|---|
| v | integer | version of this schema, 1 |
| id | integer | counts from 1 without gaps, over restarts too |
| time | string | UTC, ISO 8601, to the millisecond |
| attempt | integer | 1 at the first start, one more after each restart |
| type | string | one of the sections below |

After a resume some steps come twice: keep the line of the last attempt. A line without its newline is still being
written. New keys may be added under the same `v`; readers ignore what they do not know.
"""


def type_name(schema: dict[str, Any]) -> str:
    """A JSON Schema's type in words."""
    if "anyOf" in schema:
        return " or ".join(map(type_name, schema["anyOf"]))
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return "string"
    if "$ref" in schema:
        return f"[{str(schema['$ref']).rpartition('/')[2].lower()}](#picture)"
    if schema.get("type") == "array":
        return f"list of {type_name(schema['items'])}"
    if schema.get("type") == "object":
        return "object"
    return str(schema["type"])


def table(event: type[Event]) -> str:
    """The section of one event."""
    rows = ["| key | type | meaning |", "|---|---|---|"]
    for name, field in event.model_json_schema()["properties"].items():
        if name != "type":
            rows.append(f"| {name} | {type_name(field)} | {field['description']} |")
    return f"{event.__doc__}\n\n" + "\n".join(rows) + "\n"


def markdown() -> str:
    """The whole page."""
    sections = [f"## {name}\n\n{table(event)}" for name, event in EVENTS.items()]
    return "\n".join([_HEAD, *sections, f"## picture\n\n{table(Picture)}"])


def main(arguments: list[str]) -> int:
    """Write the page, or say (exit 1) that the one on disk is stale."""
    if arguments == ["--write"]:
        TARGET.write_text(markdown(), encoding="utf-8")
        return 0
    if arguments == ["--check"]:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == markdown():
            return 0
        print(f"{TARGET} is stale: run `python -m simpletuner.runs.reference --write`.", file=sys.stderr)
        return 1
    print("usage: python -m simpletuner.runs.reference --write | --check", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
