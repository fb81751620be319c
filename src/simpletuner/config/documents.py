"""JSON and TOML as people write them: every fault comes back as a problem that says where it stands.

JSON has no comments; a key that begins with `//` is one here, so that a program can write why a value is what it is.
"""

import json
import stat
import tomllib
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem

COMMENT = "//"
"""Begins a key that is read by people only."""


def read_document(path: Path, label: str) -> Any:
    """The value in the `.json` or `.toml` file at `path`, which messages call `label`.

    Raises:
        ConfigError: no such file, not UTF-8, a syntax error (with line and column), or a key given twice.
    """
    text = document_text(path, label)
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError.of(f"{label}: this is YAML", "JSON or TOML")
    return _toml(text, label) if path.suffix == ".toml" else _json(text, label)


def document_text(path: Path, label: str) -> str:
    """The text in the file at `path`, which messages call `label`.

    Raises:
        ConfigError: no such file, not a file, not readable, not UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError.of(f"{label}: this is a folder", "a file")
        if not stat.S_ISREG(mode):  # reading might never end
            raise ConfigError.of(f"{label}: this is a pipe, a socket or a device", "a file")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError.of(
                f"{label}: a link to {path.readlink()}, which is not there", remedy="Correct the link."
            ) from None
        raise ConfigError.of(f"{label}: no such file") from None
    except OSError as error:
        raise ConfigError.of(
            f"{label}: cannot be read ({error.strerror})",
            remedy="Give the user that runs this command the right to read it, or name another file.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError.of(f"{label}: byte {error.start} is not UTF-8", remedy="Save it as UTF-8.") from error


def _toml(text: str, label: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError.of(f"{label}: not valid TOML: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError.of(f"{label}: more than a config holds ({error})") from error


def _json(text: str, label: str) -> Any:
    repeated: list[str] = []

    def note_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs = [(name, value) for name, value in pairs if not name.startswith(COMMENT)]
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in found if names.count(name) > 1)
        return found

    try:
        value = json.loads(text, object_pairs_hook=note_repeated)
    except json.JSONDecodeError as error:
        where = f"{label}, line {error.lineno}, column {error.colno}"
        raise ConfigError.of(f"{where}: not valid JSON", remedy=_hint(text, error)) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigError.of(f"{label}: more than a config holds ({error})") from error
    ConfigError.raise_if(Problem(f"{label}: {name} is given twice", remedy="Keep one of them.") for name in repeated)
    return value


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """What is probably wrong at the place where the parser stopped."""
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
        return "JSON writes true, false and null in small letters."
    if "',' delimiter" in error.msg:
        return "A comma is missing before this."
    return f"{error.msg}."
