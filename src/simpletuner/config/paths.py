"""Paths as they are typed: placeholders, `~`, and where a relative one starts."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from simpletuner.config.values import join_names

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def filled(text: str, names: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """`text` with `{name}` replaced from `names` and `{env:VAR}` from `environ`.

    Raises:
        ValueError: a placeholder that is not known here, or a variable that is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in names:
            return names[name]
        if not name.startswith("env:"):
            known = [f"{{{known}}}" for known in (*names, "env:NAME")]
            raise ValueError(f"placeholder {match[0]} is not one of {join_names(known)}")
        variable = name.removeprefix("env:")
        if variable not in environ:
            raise ValueError(f"the environment variable {variable} is not set")
        return environ[variable]

    return _PLACEHOLDER.sub(value, text)


def joined(folder: Path, text: str) -> str:
    """The path that `text` means in `folder`."""
    return str(folder / os.path.expanduser(text))


def is_local_model(folder: Path, text: str) -> bool:
    """Whether a model's name is a path and not a Hub id: it looks like a path, or something is there."""
    looks_like_a_path = text.startswith(("/", "./", "../", "~")) or text.endswith(".safetensors")
    return looks_like_a_path or (folder / text).exists()
