"""Resolve typed paths: placeholders, `~`, and relative paths."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from simpletuner.base.errors import Problem
from simpletuner.base.files import with_home
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.base.text import is_visible, stray_characters
from simpletuner.config.values import join_names, value_text

PathRule = Callable[[str, str], Problem | None]
"""A check `rule(key, path)` of an option's or dataset key's resolved path. Returns a problem, or None if allowed."""


def allow_any_path(_key: str, _path: str) -> None:
    """The path rule that allows every path."""


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SHELL_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")


def fill_placeholders(text: str, names: Mapping[str, str], environ: Mapping[str, str] | None) -> str:
    """`text` with `{name}` replaced from `names` and `{env:VAR}` from `environ`; if `environ` is None, `{env:VAR}` is
    rejected.

    Raises:
        ValueError: a placeholder is unknown, or a variable is not set or may not be read.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in names:
            return names[name]
        if not name.startswith("env:"):
            placeholders = [f"{{{placeholder}}}" for placeholder in (*names, "env:NAME")]
            raise ValueError(f"placeholder {match[0]} is not one of {join_names(placeholders)}")
        if environ is None:
            raise ValueError(f"the page does not fill in {match[0]}: write the path itself")
        variable = name.removeprefix("env:")
        if variable not in environ:
            raise ValueError(f"the environment variable {variable} is not set")
        return environ[variable]

    return _PLACEHOLDER.sub(value, text)


def join_working_folder(folder: Path, text: str) -> str:
    """`text` as a path relative to `folder`, with `~` expanded.

    Raises:
        ConfigError: `text` begins with `~/` and the home folder is unknown.
    """
    return str(folder / with_home(text))


def is_local_model(folder: Path, text: str) -> bool:
    """Whether a model's name is a path rather than a Hub id: it looks like a path, or the path exists."""
    looks_like_a_path = text.startswith(("/", "./", "~")) or is_weight_file(text) or ".." in text.split("/")
    return looks_like_a_path or (folder / text).exists()


def stray_text(label: str, value: object, *, is_path: bool) -> Problem | None:
    """A problem with the characters of an option's value: control characters, such as the carriage returns of a script
    with Windows line endings, and in a path also shell variables. None if there is none.
    """
    if not isinstance(value, str):
        return None
    setting = f"{label} = {value_text(value)}"
    stray = [char for char in stray_characters(value) if is_path or char != "\r" or value.endswith("\r")]
    if is_path:
        stray += [char for char in value if char in "\t\n"]
    if stray:
        remedy = "Save the script or file it comes from with Unix line endings." if "\r" in stray else "Remove them."
        return Problem(setting, "text without control characters", remedy)
    if is_path and value and not is_visible(value):
        return Problem(setting, "a path")
    variable = _SHELL_VARIABLE.search(value) if is_path else None
    if variable is not None:
        name = variable[1] or variable[2]
        written = value.replace(variable[0], f"{{env:{name}}}")
        return Problem(f"{setting}: {variable[0]} is not replaced here", f"a path such as {value_text(written)}")
    return None
