"""Environments: the three files that a run is told, each a plain file that people edit too."""

import io
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from simpletuner.base.errors import ConfigError
from simpletuner.base.parts import editing, locked_part, sweep_parts
from simpletuner.config.documents import read_document
from simpletuner.config.load import CONFIG_NAMES, DATASETS_NAME, EXAMPLES_FOLDER, PROMPTS_NAME
from simpletuner.config.paths import filled, joined
from simpletuner.config.run import RunConfig
from simpletuner.server.documents import LARGEST_DOCUMENT, permissions_are_reported, read_text, write_bytes
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.uploads import UNREADABLE

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME_OR_NONE = rf"^(?:{NAME})?$"
"""The empty name is what `simpletuner train` reads unasked."""

DocumentName = Literal["config", "datasets", "prompts"]
DOCUMENTS: tuple[DocumentName, ...] = get_args(DocumentName)
REFERENCES = {"datasets": "data_backend_config", "prompts": "user_prompt_library"}
"""The option that names another file for a document."""
PATH_KEYS = {"config": "config", **REFERENCES}
"""The option, or flag, whose paths a document's are."""
FILE_NAMES = {"datasets": DATASETS_NAME, "prompts": PROMPTS_NAME}
KNOWN_FILES = (*CONFIG_NAMES, DATASETS_NAME, PROMPTS_NAME)
"""What an environment's folder holds of it."""


@dataclass(frozen=True)
class Environment:
    """Where an environment's files lie, or would."""

    roots: Roots
    name: str

    def __post_init__(self) -> None:
        if re.fullmatch(NAME_OR_NONE.strip("^$"), self.name) is None:
            raise Fault.of(
                422,
                f"{self.name!r} cannot name an environment",
                "letters, digits, dots, - and _, at most 64",
            )

    @property
    def title(self) -> str:
        """Its name in a message."""
        return self.name or "the one without a name"

    @property
    def config(self) -> Path:
        """Its config: the one that is there, else where it would be made. It need not lie below a root: see
        `document`."""
        places = [self.folder] if self.name else [self.roots.workspace, self.folder]
        usual = [place / name for place in places for name in CONFIG_NAMES]
        return next((path for path in usual if path.is_file()), self.folder / CONFIG_NAMES[0])

    @property
    def folder(self) -> Path:
        """Its folder as it is named, links not followed."""
        return self.roots.workspace / "config" / self.name

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def document(self, document: DocumentName) -> Path:
        """Where a document lies as the shell would look for it, links not followed.

        Raises:
            Fault: 403 or 422, the config names a place that the page may not write: see `reach`.
        """
        path = self.config
        if document != "config":
            path = document_place(self.roots, self.values(), document, path)
        self.roots.resolve_named(PATH_KEYS[document], str(path))
        return path

    def values(self) -> dict[str, Any]:
        """The config's keys without their dashes; none where it cannot be read."""
        try:
            return options_in(read_document(self.roots.resolve(str(self.config)), "config"))
        except (ConfigError, Fault, ValueError, RecursionError):
            return {}


def options_in(value: object) -> dict[str, Any]:
    """The keys of a config's content, dashes left out; none where it is no object."""
    return {key.lstrip("-"): held for key, held in value.items()} if isinstance(value, dict) else {}


def named_by(values: dict[str, Any]) -> dict[DocumentName, str]:
    """Which of `datasets` and `prompts` these options name a file for, as typed."""
    found: dict[DocumentName, str] = {}
    for document in ("datasets", "prompts"):
        named = values.get(REFERENCES[document])
        if isinstance(named, str) and named:
            found[document] = named
    return found


def document_place(roots: Roots, values: dict[str, Any], document: DocumentName, config: Path) -> Path:
    """Where the datasets or prompts lie that a config with these options names, or else has beside it.

    Raises:
        Fault: 422, a placeholder that cannot be filled in here.
    """
    named = named_by(values).get(document)
    if named is None:
        return config.with_name(FILE_NAMES[document])
    family = str(values.get("model_family", RunConfig.model_fields["model_family"].default))
    names = {"model_family": family}
    try:
        output_dir = values.get("output_dir", RunConfig.model_fields["output_dir"].default)
        if "{output_dir}" in named:
            names["output_dir"] = filled(str(output_dir), names, None)
        return Path(joined(roots.workspace, filled(named, names, None)))
    except (ValueError, ConfigError) as error:
        raise Fault.of(422, f"{REFERENCES[document]} = {named!r}: {error}") from None


def environments(roots: Roots) -> list[Environment]:
    """All that are there, the one without a name first. Folders that links lead out of the roots are left out."""
    folder = roots.workspace / "config"
    names = sorted(path.parent.name for name in CONFIG_NAMES for path in folder.glob(f"*/{name}"))
    valid = [name for name in dict.fromkeys(names) if re.fullmatch(NAME, name)]
    found = [Environment(roots, name) for name in ("", *valid)]
    return [environment for environment in found if environment.exists and _inside(environment)]


def _inside(environment: Environment) -> bool:
    try:
        environment.document("config")
    except Fault:
        return False
    return True


def existing(roots: Roots, name: str) -> Environment:
    """The environment of that name.

    Raises:
        Fault: 404, there is none; 403, its config lies outside the roots; 422, it is no name.
    """
    environment = Environment(roots, name)
    if not environment.exists:
        raise Fault.of(404, f"there is no environment {environment.title}", remedy="It may have been renamed.")
    environment.document("config")
    return environment


def selecting(roots: Roots, name: str) -> list[str]:
    """The flags that make a command read this environment.

    Raises:
        Fault: as `existing`.
    """
    environment = existing(roots, name)
    return [f"--env={name}"] if name else [f"--config={environment.config.relative_to(roots.workspace)}"]


def make_environment(environment: Environment, files: dict[str, bytes]) -> None:
    """Make a new environment of these files.

    Raises:
        Fault: 409, there is one of that name.
        DiskError: no space.
    """
    folder = environment.folder
    environment.roots.resolve(str(folder))
    with permissions_are_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with editing(folder):
            refuse_existing(environment)
            sweep_parts(folder.parent, f".{folder.name}.*.part")
            if folder.exists():
                # The config last: with it the environment is there.
                for name in sorted(files, key=CONFIG_NAMES.__contains__):
                    write_bytes(folder / name, files[name])
                return
            with locked_part(folder, is_folder=True) as part:
                for name, data in files.items():
                    write_bytes(part / name, data)
                os.rename(part, folder)


def refuse_existing(environment: Environment) -> None:
    """Leave a place alone that holds something.

    Raises:
        Fault: 409.
    """
    taken = [name for name in KNOWN_FILES if (environment.folder / name).exists()]
    if environment.exists or (environment.name and taken):
        raise Fault.of(409, f"there is an environment {environment.title}", remedy="Choose another name.")


def files_of(environment: Environment) -> dict[str, bytes]:
    """The documents that are there, by the name that each has in a folder of its own.

    Raises:
        Fault: one of them cannot be read or lies outside the roots.
    """
    found = {}
    for document in DOCUMENTS:
        path = environment.document(document)
        text, _ = read_text(path)
        if text is not None:
            found[path.name if document == "config" else FILE_NAMES[document]] = text.encode()
    return found


def example_files(name: str) -> dict[str, bytes]:
    """The files of an example that comes with the program.

    Raises:
        Fault: 404.
    """
    if name not in example_names():
        raise Fault.of(404, f"there is no example {name!r}", " or ".join(example_names()))
    folder = EXAMPLES_FOLDER / name
    return {file: (folder / file).read_bytes() for file in KNOWN_FILES if (folder / file).is_file()}


def example_names() -> list[str]:
    """The examples that come with the program."""
    return sorted(path.parent.name for path in EXAMPLES_FOLDER.glob("*/config.json"))


def on_its_own(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Copied files that share nothing with where they came from: a run directory of their own, and the documents
    beside the config. A TOML config stays as it is, since no comment in it shall be lost."""
    config = files.get("config.json")
    if config is None:
        return files
    try:
        values = json.loads(config.decode("utf-8-sig"))
    except ValueError:
        return files
    if not isinstance(values, dict):
        return files
    kept = {key: value for key, value in values.items() if key.lstrip("-") not in REFERENCES.values()}
    spelled = next((key for key in kept if key.lstrip("-") == "output_dir"), "output_dir")
    kept[spelled] = f"output/{name}"
    return files | {"config.json": (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()}


def rename(environment: Environment, new: Environment) -> None:
    """Give an environment's folder another name.

    Raises:
        Fault: 409, the name is taken; 422, it is the one without a name.
    """
    if not environment.name or not new.name:
        raise Fault.of(422, "the environment without a name cannot be renamed", remedy="Copy it under a name.")
    with permissions_are_reported(environment.folder), editing(environment.folder), editing(environment.config):
        if os.path.lexists(new.folder):
            raise Fault.of(409, f"there is an environment {new.title}", remedy="Choose another name.")
        os.rename(environment.folder, new.folder)


def delete(environment: Environment) -> tuple[list[Path], list[Path]]:
    """Remove an environment's own files, and its folder where nothing else is in it. Gives what was removed and what
    was left.

    Raises:
        Fault: 403, the server may not.
    """
    folder = environment.config.parent
    removed = []
    with permissions_are_reported(folder), editing(environment.config):
        for name in KNOWN_FILES:
            path = folder / name
            if path.is_file():
                path.unlink()
                removed.append(path)
        if not environment.name:
            return removed, []
        left = sorted(folder.iterdir())
        if folder.is_symlink():
            folder.unlink()
        elif not left:
            folder.rmdir()
    return removed, left


def zipped(files: dict[str, bytes]) -> bytes:
    """These files as a zip."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return made.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """The files of an environment in `data`: a zip with a config in it, at the top or in one folder, or a config by
    itself.

    Raises:
        Fault: 422, it is neither, or holds too much.
    """
    if not data.startswith(b"PK"):
        return {"config.json": _config(data)}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {Path(entry.filename).name: entry for entry in archive.infolist() if not entry.is_dir()}
            found = {name: _unpacked(archive, entries[name]) for name in KNOWN_FILES if name in entries}
    except UNREADABLE as error:
        raise Fault.of(422, f"the zip cannot be read ({error})") from None
    if not any(name in found for name in CONFIG_NAMES):
        raise Fault.of(422, "the zip holds no config", " or ".join(CONFIG_NAMES))
    if "config.json" in found:
        _config(found["config.json"])
        found.pop("config.toml", None)
    return found


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        data = file.read(LARGEST_DOCUMENT + 1)
    if len(data) > LARGEST_DOCUMENT:
        raise Fault.of(413, f"{entry.filename!r} is larger than {LARGEST_DOCUMENT:,} bytes")
    return data


def _config(data: bytes) -> bytes:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Fault.of(422, "what was sent is no JSON", "a config.json, or a zip with one in it") from None
    if not isinstance(value, dict):
        raise Fault.of(422, "what was sent is no config", 'an object {"option": value}')
    if len(data) > LARGEST_DOCUMENT:
        raise Fault.of(413, f"the config has {len(data):,} bytes", f"at most {LARGEST_DOCUMENT:,}")
    return data
