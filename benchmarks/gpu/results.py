"""Results of the GPU measurements: reads JSON lines, writes Markdown tables. Works without torch."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]

GIB = 2**30
EXPANDABLE_SEGMENTS, WORK = "expandable segments", "work"
"""Name and value of the fact by which `all.py` decides whether measurements request expandable segments, as the program
does.
"""


def report(kind: str, **fields: Any) -> None:
    """Print one result as a JSON line, at once: printed lines survive a later crash."""
    sys.stdout.write(json.dumps({"kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def markdown(rows: Sequence[Row]) -> str:
    """All results as Markdown, with a section for each kind of row."""
    sections = [
        facts(rows),
        table("Checks", of_kind(rows, "check"), CHECKS),
        table("Ceilings", of_kind(rows, "ceiling"), CEILINGS),
        table("Training steps", of_kind(rows, "step"), STEPS),
        table("Where the time of a step goes", of_kind(rows, "kernel"), KERNELS),
        table("Attention", of_kind(rows, "attention"), ATTENTION),
        table("Text encoder and VAE", of_kind(rows, "encoder"), ENCODERS),
        table("Soak", of_kind(rows, "test"), TESTS),
        table("Measurements", of_kind(rows, "outcome"), OUTCOMES),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def facts(rows: Sequence[Row]) -> str:
    """The machine, as a list."""
    lines = [f"- {row['name']}: {row['value']}" for row in of_kind(rows, "fact")]
    return "\n".join(["## Machine", "", *lines]) if lines else ""


def table(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A section with one row for each result; empty if there is none."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(head for head, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [cell(row).replace("|", "¦").replace("\n", " ") for _, cell in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {title}", "", *lines])


def text(key: str) -> Callable[[Row], str]:
    """A function that returns the field `key` unchanged; empty if it is missing or null."""
    return lambda row: "" if row.get(key) is None else str(row[key])


def number(key: str, digits: str, scale: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """A function that formats the field `key` times `scale` with `digits`; empty if it is missing or null."""
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:{digits}}{unit}"


def against_plan(row: Row) -> str:
    """The allocator's peak relative to the plan's estimate, as a signed percentage; empty if either is unknown."""
    if not row.get("planned_bytes") or not row.get("allocated_bytes"):
        return ""
    return f"{row['allocated_bytes'] / row['planned_bytes'] - 1:+.1%}"


STEPS: Sequence[Column] = (
    ("model", text("model")),
    ("weights", text("precision")),
    ("held", text("residency")),
    ("cap", number("cap_gib", "g", unit=" GiB")),
    ("image", text("image")),
    ("batch", text("batch")),
    ("blocks", text("blocks")),
    ("variant", text("variant")),
    ("s/step", number("seconds", ".3f")),
    ("images/s", number("images_per_s", ".3f")),
    ("TFLOP/s", number("flop_per_s", ".0f", 1e-12)),
    ("MFU", number("mfu", ".1%")),
    ("HFU", number("hfu", ".1%")),
    ("peak allocated", number("allocated_bytes", ".2f", 1 / GIB, " GiB")),
    ("reserved", number("reserved_bytes", ".2f", 1 / GIB, " GiB")),
    ("planned", number("planned_bytes", ".2f", 1 / GIB, " GiB")),
    ("against plan", against_plan),
    ("copied", number("copied_bytes", ".1f", 1 / GIB, " GiB/step")),
    ("hidden", number("hidden", ".0%")),
    ("process RAM", number("ram_bytes", ".1f", 1 / GIB, " GiB")),
    ("first step", number("first_s", ".1f", unit=" s")),
    ("note", text("note")),
)
CHECKS: Sequence[Column] = (
    ("check", text("what")),
    ("passed", lambda row: "yes" if row["passed"] else "**no**"),
    ("error", number("error", ".1e")),
    ("bound", number("bound", ".1e")),
    ("note", text("note")),
)
CEILINGS: Sequence[Column] = (
    ("what", text("what")),
    ("rate", lambda row: f"{row['rate']:.4g} {row['unit']}"),
)
KERNELS: Sequence[Column] = (
    ("case", text("case")),
    ("kernel", lambda row: f"`{row['name'][:90]}`"),
    ("calls a step", text("calls")),
    ("ms a step", number("ms", ".1f")),
    ("share", number("share", ".1%")),
)
ATTENTION: Sequence[Column] = (
    ("shape (batch, heads, tokens, width)", text("shape")),
    ("kernel", text("kernel")),
    ("forward", number("forward_ms", ".3f", unit=" ms")),
    ("forward and backward", number("both_ms", ".3f", unit=" ms")),
    ("TFLOP/s forward", number("forward_flop_per_s", ".0f", 1e-12)),
    ("TFLOP/s both", number("both_flop_per_s", ".0f", 1e-12)),
    ("note", text("note")),
)
ENCODERS: Sequence[Column] = (
    ("what", text("what")),
    ("batch", text("batch")),
    ("rate", lambda row: "" if row.get("rate") is None else f"{row['rate']:.3g} {row['unit']}"),
    ("peak allocated", number("allocated_bytes", ".2f", 1 / GIB, " GiB")),
    ("note", text("note")),
)
TESTS: Sequence[Column] = (
    ("test", text("name")),
    ("outcome", text("outcome")),
    ("seconds", number("seconds", ".1f")),
    ("note", text("note")),
)
OUTCOMES: Sequence[Column] = (
    ("measurement", text("measurement")),
    ("outcome", text("outcome")),
    ("seconds", number("seconds", ".0f")),
    ("limit", number("limit_s", ".0f", unit=" s")),
    ("note", text("note")),
)
