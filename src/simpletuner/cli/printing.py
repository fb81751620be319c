"""Formatting of output: tables and text that fit the terminal, and JSON for programs."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from simpletuner.base.console import terminal_width

_WIDEST = 100
_NARROWEST = 40
_USAGE = re.compile(r"(?:usage:)? *(?=simpletuner )")
_ROW = re.compile(r" *(?:\S+|--\S+ [A-Z]+) {2,}(?=\S)")
_LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_UNQUOTED = re.compile(r"-\S+|\S*[_./]\S*|\".*\"")


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    """`rows` as aligned columns; `indent` begins each line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(indent + line for line in lines)


def json_text(value: object) -> str:
    """The one JSON object that `--json` prints."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def plain(text: str) -> str:
    """`text` without Markdown. A link becomes its words, followed by the file in docs/ or the address. Code becomes
    bare text if it is an option, a file name or quoted, and quoted text otherwise."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2].partition("#")[0]
        if not target:
            return words
        target = target if "://" in target else f"docs/{target}"
        return target if words in target else f"{words} ({target})"

    def code(match: re.Match[str]) -> str:
        return match[1] if _UNQUOTED.fullmatch(match[1]) else f"'{match[1]}'"

    return _CODE.sub(code, _LINK.sub(link, text))


def fitted(text: str) -> str:
    """`text` without Markdown, filled to the terminal's width: usage lines, rows of a word and its meaning, paragraphs.

    Any other line continues the one before it.
    """
    return "\n\n".join(
        "\n".join(wrapped(item, hang=hang) for item, hang in items_of(plain(block).splitlines()))
        for block in text.strip("\n").split("\n\n")
    )


def items_of(lines: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The items of a block, each joined into one line, with the indentation of its continuation lines."""
    items: list[tuple[str, int]] = []
    for line in lines:
        usage, row = _USAGE.match(line), _ROW.match(line)
        if usage:
            items.append((line, usage.end() + 4))
        elif row:
            items.append((line, row.end()))
        elif items:
            items[-1] = (f"{items[-1][0]} {line.strip()}", items[-1][1])
        else:
            items.append((line, len(line) - len(line.lstrip())))
    yield from items


def rows_text(rows: Mapping[str, str]) -> str:
    """Flags or words with their meanings, in two columns; on a narrow terminal, each meaning below its flag."""
    column = max(map(len, rows)) + 4
    if column > _widest_indent():
        return "\n".join(f"{wrapped(label, 2, 6)}\n{wrapped(plain(text), 6, 6)}" for label, text in rows.items())
    return "\n".join(wrapped(f"  {label}".ljust(column) + plain(text), hang=column) for label, text in rows.items())


def wrapped(text: str, indent: int = 0, hang: int = 0) -> str:
    """`text` in lines that fit the terminal. A hanging indent that is too wide is replaced by a small one."""
    width = _width()
    hang = hang if hang <= _widest_indent() else indent + 6
    return textwrap.fill(
        text,
        width=width,
        initial_indent=" " * indent,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _widest_indent() -> int:
    return _width() * 3 // 5


def _width() -> int:
    return max(_NARROWEST, min(_WIDEST, terminal_width()))
