"""Environments: the three files that configure a run, each a plain file that people also edit by hand."""

import io
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from simpletuner.base.errors import ConfigError
from simpletuner.base.parts import folder_locked, locked_part, remove_abandoned_parts
from simpletuner.config.documents import read_document
from simpletuner.config.load import CONFIG_NAMES, DATASETS_NAME, EXAMPLES_FOLDER, PROMPTS_NAME
from simpletuner.config.paths import fill_placeholders, join_working_folder
from simpletuner.config.run import RunConfig
from simpletuner.server.documents import LARGEST_DOCUMENT, permissions_are_reported, read_text, write_bytes
from simpletuner.server.faults import Fault
from simpletuner.server.roots import Roots
from simpletuner.server.uploads import UNREADABLE

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NAME_OR_NONE = rf"^(?:{NAME})?$"
"""The empty name stands for the config that `simpletuner train` reads by default."""

DocumentName = Literal["config", "datasets", "prompts"]
DOCUMENTS: tuple[DocumentName, ...] = get_args(DocumentName)
REFERENCES = {"datasets": "data_backend_config", "prompts": "user_prompt_library"}
"""The option that names a different file for a document."""
PATH_KEYS = {"config": "config", **REFERENCES}
"""The option or flag whose path rule (`reach.PATHS`) applies to a document."""
FILE_NAMES = {"datasets": DATASETS_NAME, "prompts": PROMPTS_NAME}
KNOWN_FILES = (*CONFIG_NAMES, DATASETS_NAME, PROMPTS_NAME)
"""Names of an environment's files in its folder."""


@dataclass(frozen=True)
class Environment:
    """Paths of an environment's files, which need not exist."""

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
        """The environment's name in messages."""
        return self.name or "without a name"

    @property
    def config(self) -> Path:
        """The existing config, else the path for a new one. It may lie outside the roots: see `document`."""
        folders = [self.folder] if self.name else [self.roots.workspace, self.folder]
        candidates = [folder / name for folder in folders for name in CONFIG_NAMES]
        return next((path for path in candidates if path.is_file()), self.folder / CONFIG_NAMES[0])

    @property
    def folder(self) -> Path:
        """The environment's folder, links not followed."""
        return self.roots.workspace / "config" / self.name

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def document(self, document: DocumentName) -> Path:
        """Return a document's path as the CLI resolves it, links not followed.

        Raises:
            Fault: 403 or 422, the config names a path that the page may not write: see `reach`.
        """
        path = self.config
        if document != "config":
            path = document_path(self.roots, self.values(), document, path)
        self.roots.resolve_for(PATH_KEYS[document], str(path))
        return path

    def values(self) -> dict[str, Any]:
        """The config's options, without leading dashes; empty if it cannot be read."""
        try:
            return options_in(read_document(self.roots.resolve(str(self.config)), "config"))
        except (ConfigError, Fault, ValueError, RecursionError):
            return {}


def options_in(value: object) -> dict[str, Any]:
    """The options in a parsed config, without leading dashes; empty if it is not an object."""
    return {key.lstrip("-"): option for key, option in value.items()} if isinstance(value, dict) else {}


def named_documents(values: dict[str, Any]) -> dict[DocumentName, str]:
    """Return the paths that these options name for `datasets` and `prompts`, as written."""
    paths: dict[DocumentName, str] = {}
    for document in ("datasets", "prompts"):
        path = values.get(REFERENCES[document])
        if isinstance(path, str) and path:
            paths[document] = path
    return paths


def document_path(roots: Roots, values: dict[str, Any], document: DocumentName, config: Path) -> Path:
    """Return the path of the datasets or prompts that these options name, else the default beside the config.

    Raises:
        Fault: 422, it holds a placeholder that cannot be filled in here.
    """
    named_path = named_documents(values).get(document)
    if named_path is None:
        return config.with_name(FILE_NAMES[document])
    family = str(values.get("model_family", RunConfig.model_fields["model_family"].default))
    names = {"model_family": family}
    try:
        output_dir = values.get("output_dir", RunConfig.model_fields["output_dir"].default)
        if "{output_dir}" in named_path:
            names["output_dir"] = fill_placeholders(str(output_dir), names, None)
        return Path(join_working_folder(roots.workspace, fill_placeholders(named_path, names, None)))
    except (ValueError, ConfigError) as error:
        raise Fault.of(422, f"{REFERENCES[document]} = {named_path!r}: {error}") from None


def environments(roots: Roots) -> list[Environment]:
    """List all environments, the unnamed one first. Leaves out folders whose links lead outside the roots."""
    folder = roots.workspace / "config"
    names = sorted(path.parent.name for name in CONFIG_NAMES for path in folder.glob(f"*/{name}"))
    valid = [name for name in dict.fromkeys(names) if re.fullmatch(NAME, name)]
    candidates = [Environment(roots, name) for name in ("", *valid)]
    return [environment for environment in candidates if environment.exists and _is_inside(environment)]


def _is_inside(environment: Environment) -> bool:
    try:
        environment.document("config")
    except Fault:
        return False
    return True


def existing_environment(roots: Roots, name: str) -> Environment:
    """Return the environment with this name.

    Raises:
        Fault: 404, there is none; 403, its config lies outside the roots; 422, the name is invalid.
    """
    environment = Environment(roots, name)
    if not environment.exists:
        raise Fault.of(404, f"there is no environment {environment.title}", remedy="It may have been renamed.")
    environment.document("config")
    return environment


def selecting_flags(roots: Roots, name: str) -> list[str]:
    """Return the flags that make a command read this environment.

    Raises:
        Fault: as `existing_environment`.
    """
    environment = existing_environment(roots, name)
    return [f"--env={name}"] if name else [f"--config={environment.config.relative_to(roots.workspace)}"]


def make_environment(environment: Environment, files: dict[str, bytes]) -> None:
    """Create an environment with these files.

    Raises:
        Fault: 409, the name is taken.
        DiskError: no space left.
    """
    folder = environment.folder
    environment.roots.resolve(str(folder))
    with permissions_are_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_locked(folder):
            refuse_existing(environment)
            remove_abandoned_parts(folder.parent, f".{folder.name}.*.part")
            if folder.exists():
                # The config last: until it is written, the environment does not exist.
                for name in sorted(files, key=CONFIG_NAMES.__contains__):
                    write_bytes(folder / name, files[name])
                return
            with locked_part(folder, is_folder=True) as part:
                for name, data in files.items():
                    write_bytes(part / name, data)
                os.rename(part, folder)


def refuse_existing(environment: Environment) -> None:
    """Refuse a name that is taken.

    Raises:
        Fault: 409, an environment or one of its files exists.
    """
    taken = [name for name in KNOWN_FILES if (environment.folder / name).exists()]
    if environment.exists or (environment.name and taken):
        raise Fault.of(409, f"there is already an environment {environment.title}", remedy="Choose another name.")


def document_files(environment: Environment) -> dict[str, bytes]:
    """Return the existing documents, by their default file names.

    Raises:
        Fault: one of them cannot be read or lies outside the roots.
    """
    files = {}
    for document in DOCUMENTS:
        path = environment.document(document)
        text, _ = read_text(path)
        if text is not None:
            files[path.name if document == "config" else FILE_NAMES[document]] = text.encode()
    return files


def example_files(name: str) -> dict[str, bytes]:
    """Return the files of a bundled example.

    Raises:
        Fault: 404, there is no such example.
    """
    if name not in example_names():
        raise Fault.of(404, f"there is no example {name!r}", " or ".join(example_names()))
    folder = EXAMPLES_FOLDER / name
    return {file: (folder / file).read_bytes() for file in KNOWN_FILES if (folder / file).is_file()}


def example_names() -> list[str]:
    """List the bundled examples."""
    return sorted(path.parent.name for path in EXAMPLES_FOLDER.glob("*/config.json"))


def detached_copy(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return copied files that share nothing with their source: the config gets its own output_dir and uses the
    documents beside it. A TOML config is copied unchanged, so that its comments survive."""
    config = files.get("config.json")
    if config is None:
        return files
    try:
        values = json.loads(config.decode("utf-8-sig"))
    except ValueError:
        return files
    if not isinstance(values, dict):
        return files
    options = {key: value for key, value in values.items() if key.lstrip("-") not in REFERENCES.values()}
    output_key = next((key for key in options if key.lstrip("-") == "output_dir"), "output_dir")
    options[output_key] = f"output/{name}"
    return files | {"config.json": (json.dumps(options, indent=2, ensure_ascii=False) + "\n").encode()}


def rename(environment: Environment, new: Environment) -> None:
    """Rename an environment's folder.

    Raises:
        Fault: 409, the name is taken; 422, the environment has no name.
    """
    if not environment.name or not new.name:
        raise Fault.of(422, "the environment without a name cannot be renamed", remedy="Copy it to a new name.")
    with (
        permissions_are_reported(environment.folder),
        folder_locked(environment.folder),
        folder_locked(environment.config),
    ):
        if os.path.lexists(new.folder):
            raise Fault.of(409, f"there is already an environment {new.title}", remedy="Choose another name.")
        os.rename(environment.folder, new.folder)


def delete(environment: Environment) -> tuple[list[Path], list[Path]]:
    """Delete an environment's files, and its folder if nothing else is in it. Returns the removed and remaining paths.

    Raises:
        Fault: 403, no permission.
    """
    folder = environment.config.parent
    removed = []
    with permissions_are_reported(folder), folder_locked(environment.config):
        for name in KNOWN_FILES:
            path = folder / name
            if path.is_file():
                path.unlink()
                removed.append(path)
        if not environment.name:
            return removed, []
        remaining = sorted(folder.iterdir())
        if folder.is_symlink():
            folder.unlink()
        elif not remaining:
            folder.rmdir()
    return removed, remaining


def zipped(files: dict[str, bytes]) -> bytes:
    """Pack files into a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def unzipped(data: bytes) -> dict[str, bytes]:
    """Return the environment's files in `data`: a zip that holds a config, at the top or in one folder, or a bare
    config.json.

    Raises:
        Fault: 422, it is neither; 413, a file in it is too large.
    """
    if not data.startswith(b"PK"):
        return {"config.json": _config(data)}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {Path(entry.filename).name: entry for entry in archive.infolist() if not entry.is_dir()}
            files = {name: _unpacked(archive, entries[name]) for name in KNOWN_FILES if name in entries}
    except UNREADABLE as error:
        raise Fault.of(422, f"the zip cannot be read ({error})") from None
    if not any(name in files for name in CONFIG_NAMES):
        raise Fault.of(422, "the zip contains no config", " or ".join(CONFIG_NAMES))
    if "config.json" in files:
        _config(files["config.json"])
        files.pop("config.toml", None)
    return files


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
        raise Fault.of(422, "the request body is not JSON", "a config.json, or a zip with one in it") from None
    if not isinstance(value, dict):
        raise Fault.of(422, "the request body is not a config", 'an object {"option": value}')
    if len(data) > LARGEST_DOCUMENT:
        raise Fault.of(413, f"the config has {len(data):,} bytes", f"at most {LARGEST_DOCUMENT:,}")
    return data
