"""A draft that the shell is to judge: written to a temporary folder, of which no answer tells."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.parts import locked_part, sweep_parts
from simpletuner.config.documents import read_document
from simpletuner.server.body import RequestBody
from simpletuner.server.documents import encoded, read_text
from simpletuner.server.environments import (
    DOCUMENTS,
    FILE_NAMES,
    NAME_OR_NONE,
    REFERENCES,
    DocumentName,
    Environment,
    document_place,
    named_by,
    options_in,
)
from simpletuner.server.faults import Fault, ProblemAnswer
from simpletuner.server.shell import Finished

_FOLDER_NAME = "simpletuner-draft-"


class Draft(RequestBody):
    """An environment's documents as they would be saved. One that is null is as it is on disk."""

    name: str = Field(pattern=NAME_OR_NONE)
    config: str
    datasets: str | None = None
    prompts: str | None = None


@dataclass(frozen=True)
class Drafted:
    """A draft on disk."""

    flags: tuple[str, ...]
    """They make a command read it."""
    folder: Path
    shown: Mapping[DocumentName, str]
    """How messages are to call each document."""
    overridden: tuple[str, ...]
    """Options that stand in the draft and were given as flags, to lead to it."""
    names: Mapping[DocumentName, str]
    """How each is called in the temporary folder."""
    problems: tuple[Problem, ...]
    """What is wrong with the paths that the flags replace."""

    def document_of(self, problem: ProblemAnswer) -> DocumentName:
        """Which document a message is about: the one that it names first, else the config."""
        places = {name: problem.text.find(shown) for name, shown in self.shown.items()}
        named = {name: place for name, place in places.items() if place >= 0}
        if problem.key or not named:
            return "config"
        return min(named, key=lambda name: (named[name], -len(self.shown[name])))

    def cleaned(self, text: str) -> str:
        """`text` with the documents' own paths in place of the temporary ones."""
        for document in DOCUMENTS:
            text = text.replace(str(self.folder / self.names[document]), self.shown[document])
        return text.replace(str(self.folder), str(Path(self.shown["config"]).parent))


def without_traces(finished: Finished, written: Drafted) -> Finished:
    """What a command printed, with the documents' own paths."""
    return replace(finished, out=written.cleaned(finished.out), err=written.cleaned(finished.err))


@contextlib.contextmanager
def draft_folder() -> Iterator[Path]:
    """A folder for a draft that others may not enter, removed at the end. Those that a killed server left are removed
    first."""
    folder = Path(tempfile.gettempdir()).resolve()
    sweep_parts(folder, f".{_FOLDER_NAME}{'[0-9a-f]' * 16}.*.part")
    with locked_part(folder / f"{_FOLDER_NAME}{secrets.token_hex(8)}", is_folder=True, mode=0o700) as made:
        yield made


def drafted(draft: Draft, environment: Environment, folder: Path) -> Drafted:
    """Write a draft to `folder`.

    Raises:
        Fault: a document is too large or cannot be read.
    """
    own = environment.config
    names: dict[DocumentName, str] = {
        "config": own.name,
        **{name: FILE_NAMES[name] for name in ("datasets", "prompts")},
    }
    (folder / own.name).write_bytes(encoded(draft.config))
    try:
        values = options_in(read_document(folder / own.name, own.name))
    except (ConfigError, ValueError, RecursionError):
        values = {}
    named = named_by(values)
    shown: dict[DocumentName, str] = {"config": environment.roots.shown(own)}
    flags, overridden = [f"--config={folder / own.name}"], []
    problems: list[Problem] = []
    texts: dict[DocumentName, str | None] = {"datasets": draft.datasets, "prompts": draft.prompts}
    for document, text in texts.items():
        beside = own.with_name(FILE_NAMES[document])
        shown[document] = named.get(document, environment.roots.shown(beside))
        path = folder / names[document]
        if text is not None:
            path.write_bytes(encoded(text))
            if document in named:
                flags.append(f"--{REFERENCES[document]}={path}")
                overridden.append(REFERENCES[document])
                problems += _refusals(environment, values, document)
        elif document not in named:
            environment.roots.resolve_named(REFERENCES[document], str(beside))
            there, _ = read_text(beside)
            if there is not None:
                path.write_text(there, encoding="utf-8")
    return Drafted(tuple(flags), folder, shown, tuple(overridden), names, tuple(problems))


def _refusals(environment: Environment, values: dict[str, Any], document: DocumentName) -> list[Problem]:
    """What is wrong with the path that a draft's config names for a document."""
    key = REFERENCES[document]
    try:
        refused = environment.roots.refusal(
            key, str(document_place(environment.roots, values, document, environment.config))
        )
    except Fault as fault:
        return [replace(problem, key=key) for problem in fault.problems]
    return [] if refused is None else [refused]
