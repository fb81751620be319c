"""Readers for hand-written JSON and TOML. Each error message names the position in the file.

In JSON, a key that begins with `//` is a comment.
"""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem

COMMENT = "//"
"""Prefix of keys that are comments; readers drop them."""


def read_document(path: Path, label: str) -> Any:
    """Parse the `.json` or `.toml` file at `path`, which messages call `label`.

    Raises:
        ConfigError: the file is missing or unreadable, is not UTF-8, has a syntax error (the message has line and
            column), or repeats a key.
    """
    text = document_text(path, label)
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError.of(f"{label}: this is YAML", "JSON or TOML")
    return _toml(text, label) if path.suffix == ".toml" else _json(text, label)


def document_text(path: Path, label: str) -> str:
    """The text of the file at `path`, which messages call `label`.

    Raises:
        ConfigError: the file is missing, not a regular file, unreadable, or not UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError.of(f"{label}: this is a folder", "a file")
        if not stat.S_ISREG(mode):  # reading it might block forever
            raise ConfigError.of(f"{label}: this is a pipe, a socket or a device", "a file")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError.of(
                f"{label}: a link to {path.readlink()}, which does not exist", remedy="Correct the link."
            ) from None
        raise ConfigError.of(f"{label}: no such file") from None
    except OSError as error:
        raise ConfigError.of(
            f"{label}: cannot be read ({error.strerror})",
            remedy="Give the user who runs this command permission to read it, or name another file.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError.of(f"{label}: byte {error.start} is not UTF-8", remedy="Save it as UTF-8.") from error


def _toml(text: str, label: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError.of(f"{label}: not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError.of(f"{label}: too large a value for a config ({error})") from error


def _json(text: str, label: str) -> Any:
    repeated: list[str] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs = [(name, value) for name, value in pairs if not name.startswith(COMMENT)]
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in values if names.count(name) > 1)
        return values

    try:
        value = json.loads(text, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        location = f"{label}, line {error.lineno}, column {error.colno}"
        raise ConfigError.of(f"{location}: not valid JSON", remedy=_hint(text, error)) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of nested brackets
        raise ConfigError.of(f"{label}: too large a value for a config ({error})") from error
    ConfigError.raise_if(Problem(f"{label}: {name} is given twice", remedy="Keep one of them.") for name in repeated)
    return value


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """The probable mistake at the position where the parser stopped."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not before and not after:
        return "The file is empty."
    if not after:
        return "It ends too early: a closing bracket is missing."
    if before.endswith(",") and after[0] in "}]":
        return f"Remove the comma before {after[0]}."
    if after[0] == "," and after[1:].lstrip()[:1] in ("}", "]"):
        return "Remove the last comma."
    if after[0] == "'":
        return "Use double quotes."
    if after.startswith(("//", "#", "/*")):
        return 'JSON has no comments: remove this one, or write it as a key, "//": "…".'
    if after.startswith(("True", "False", "None")):
        return "JSON writes true, false and null in lowercase."
    if "',' delimiter" in error.msg:
        return "A comma is missing before this."
    return f"{error.msg}."
