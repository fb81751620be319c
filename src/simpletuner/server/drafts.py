"""Drafts that a CLI command checks: written to a temporary folder whose path no response reveals."""

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.parts import locked_part, remove_abandoned_parts
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
    document_path,
    named_documents,
    options_in,
)
from simpletuner.server.faults import Fault, ProblemAnswer
from simpletuner.server.shell import Finished

_FOLDER_NAME = "simpletuner-draft-"


class Draft(RequestBody):
    """An environment's documents as they would be saved; null stands for the one on disk."""

    name: str = Field(pattern=NAME_OR_NONE)
    config: str
    datasets: str | None = None
    prompts: str | None = None


@dataclass(frozen=True)
class WrittenDraft:
    """A draft on disk."""

    flags: tuple[str, ...]
    """Flags that make a command read the draft."""
    folder: Path
    shown_paths: Mapping[DocumentName, str]
    """The path by which messages name each document."""
    overridden: tuple[str, ...]
    """Options of the draft that `flags` override, so that they name the draft's own files."""
    names: Mapping[DocumentName, str]
    """Each document's file name in the temporary folder."""
    problems: tuple[Problem, ...]
    """Problems with the paths that `flags` override."""

    def document_of(self, problem: ProblemAnswer) -> DocumentName:
        """Return the document that a message is about: the first one that it names, else the config."""
        positions = {name: problem.text.find(path) for name, path in self.shown_paths.items()}
        named_positions = {name: position for name, position in positions.items() if position >= 0}
        if problem.key or not named_positions:
            return "config"
        return min(named_positions, key=lambda name: (named_positions[name], -len(self.shown_paths[name])))

    def with_real_paths(self, text: str) -> str:
        """`text` with the documents' real paths in place of the temporary ones."""
        for document in DOCUMENTS:
            text = text.replace(str(self.folder / self.names[document]), self.shown_paths[document])
        return text.replace(str(self.folder), str(Path(self.shown_paths["config"]).parent))


def with_real_paths(finished: Finished, written: WrittenDraft) -> Finished:
    """The command's output with the documents' real paths."""
    return replace(finished, out=written.with_real_paths(finished.out), err=written.with_real_paths(finished.err))


@contextlib.contextmanager
def draft_folder() -> Iterator[Path]:
    """Create a folder for a draft, private to this user, and remove it on exit. Folders that a killed server left are
    removed first."""
    folder = Path(tempfile.gettempdir()).resolve()
    remove_abandoned_parts(folder, f".{_FOLDER_NAME}{'[0-9a-f]' * 16}.*.part")
    with locked_part(folder / f"{_FOLDER_NAME}{secrets.token_hex(8)}", is_folder=True, mode=0o700) as draft:
        yield draft


def write_draft(draft: Draft, environment: Environment, folder: Path) -> WrittenDraft:
    """Write a draft to `folder`.

    Raises:
        Fault: a document is too large or cannot be read.
    """
    config = environment.config
    names: dict[DocumentName, str] = {
        "config": config.name,
        **{name: FILE_NAMES[name] for name in ("datasets", "prompts")},
    }
    (folder / config.name).write_bytes(encoded(draft.config))
    try:
        values = options_in(read_document(folder / config.name, config.name))
    except (ConfigError, ValueError, RecursionError):
        values = {}
    named_paths = named_documents(values)
    shown_paths: dict[DocumentName, str] = {"config": environment.roots.display_path(config)}
    flags, overridden = [f"--config={folder / config.name}"], []
    problems: list[Problem] = []
    texts: dict[DocumentName, str | None] = {"datasets": draft.datasets, "prompts": draft.prompts}
    for document, text in texts.items():
        default_path = config.with_name(FILE_NAMES[document])
        shown_paths[document] = named_paths.get(document, environment.roots.display_path(default_path))
        path = folder / names[document]
        if text is not None:
            path.write_bytes(encoded(text))
            if document in named_paths:
                flags.append(f"--{REFERENCES[document]}={path}")
                overridden.append(REFERENCES[document])
                problems += _path_problems(environment, values, document)
        elif document not in named_paths:
            environment.roots.resolve_for(REFERENCES[document], str(default_path))
            saved_text, _ = read_text(default_path)
            if saved_text is not None:
                path.write_text(saved_text, encoding="utf-8")
    return WrittenDraft(tuple(flags), folder, shown_paths, tuple(overridden), names, tuple(problems))


def _path_problems(environment: Environment, values: dict[str, Any], document: DocumentName) -> list[Problem]:
    """The problems with the path that a draft's config names for a document."""
    key = REFERENCES[document]
    try:
        refused = environment.roots.refusal(
            key, str(document_path(environment.roots, values, document, environment.config))
        )
    except Fault as fault:
        return [replace(problem, key=key) for problem in fault.problems]
    return [] if refused is None else [refused]
