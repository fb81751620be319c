"""Which paths the page may read, write, show or start: one rule for requests, configurations and dataset lists.

A path is first resolved, placeholders and links included. It must then lie in the workspace or in another root, contain
no name below that root that begins with a dot, and be of the kind that its key accepts. For a configuration that the
page passes to a command, the command applies the rule, because it resolves the paths: see `page_reach`.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal, NamedTuple

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.imagefiles import IMAGE_SUFFIXES
from simpletuner.base.tensorfile import is_weight_file
from simpletuner.config.load import CONFIG_NAMES, PAGE_ROOTS_VARIABLE
from simpletuner.config.values import value_text
from simpletuner.runs.layout import RunDirectory


class PathKind(Enum):
    """Kind of path that a key accepts; the value is its description in messages."""

    DOCUMENT = "a .json or .toml file outside run folders"
    TEXTS = "a .txt or .json file outside run folders"
    FOLDER = "a folder"
    RUN = "a run's folder, or a folder without a configuration"
    ADAPTER = "a .safetensors file, or a folder that contains one"
    IMAGE = "an image file"
    MODEL = "a model folder, or a .safetensors or .gguf file"


class PathUse(NamedTuple):
    """Kind of a path, and how it is used."""

    kind: PathKind
    use: Literal["read", "write", "start"]


PATHS = {
    # Options of a configuration.
    "config": PathUse(PathKind.DOCUMENT, "write"),
    "data_backend_config": PathUse(PathKind.DOCUMENT, "write"),
    "user_prompt_library": PathUse(PathKind.DOCUMENT, "write"),
    "optimizer_config": PathUse(PathKind.DOCUMENT, "read"),
    "deepspeed_config": PathUse(PathKind.DOCUMENT, "read"),
    "peft_lora_target_modules": PathUse(PathKind.DOCUMENT, "read"),
    "tread_config": PathUse(PathKind.DOCUMENT, "read"),
    "custom_text_encoder_intermediary_layers": PathUse(PathKind.DOCUMENT, "read"),
    "flow_custom_timesteps": PathUse(PathKind.DOCUMENT, "read"),
    "validation_drift_prompts": PathUse(PathKind.DOCUMENT, "read"),
    "output_dir": PathUse(PathKind.RUN, "start"),
    "resume_from_checkpoint": PathUse(PathKind.FOLDER, "read"),
    "init_lora": PathUse(PathKind.ADAPTER, "read"),
    "pretrained_model_name_or_path": PathUse(PathKind.MODEL, "read"),
    "pretrained_transformer_model_name_or_path": PathUse(PathKind.MODEL, "read"),
    "pretrained_vae_model_name_or_path": PathUse(PathKind.MODEL, "read"),
    "pretrained_text_encoder_model_name_or_path": PathUse(PathKind.MODEL, "read"),
    "validation_preview_model": PathUse(PathKind.MODEL, "read"),
    "base_model_cache_dir": PathUse(PathKind.FOLDER, "write"),
    "cache_dir": PathUse(PathKind.FOLDER, "write"),  # also a key of text_embeds datasets
    "group_offload_to_disk_path": PathUse(PathKind.FOLDER, "write"),
    # Keys of a dataset entry.
    "instance_data_dir": PathUse(PathKind.FOLDER, "read"),
    "cache_dir_vae": PathUse(PathKind.FOLDER, "write"),
    "caption_filter_list": PathUse(PathKind.TEXTS, "read"),
    # A key of prompt libraries, and a flag of `simpletuner sample`.
    "references": PathUse(PathKind.IMAGE, "read"),
    # Flags of `simpletuner sample`.
    "run": PathUse(PathKind.FOLDER, "read"),
    "out": PathUse(PathKind.FOLDER, "write"),
    "lora": PathUse(PathKind.ADAPTER, "read"),
}
"""Every option, dataset key and flag that names a path, or that accepts the path of a file with its JSON value."""


class OutOfReach(ConfigError):
    """The path lies outside the folders of the page, or is hidden."""


@dataclass(frozen=True)
class Reach:
    """The workspace, where relative paths start, and the other roots; all are real paths."""

    workspace: Path
    extra_roots: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.workspace, *self.extra_roots)

    def contains(self, path: Path) -> bool:
        """Whether a real path (links followed) lies below a root."""
        return any(path.is_relative_to(root) for root in self.all)

    def checked_path(self, text: str, label: str = "") -> Path:
        """Return the real path that `text` names; it need not exist. Messages call it `label`, by default `text`.

        Raises:
            OutOfReach: it lies outside or is hidden, like the queue's folder.
            ConfigError: it is not a valid path.
        """
        label = label or text
        if not text or "\0" in text:
            raise ConfigError.of(f"{text!r} is not a path")
        try:
            path = (self.workspace / Path(text).expanduser()).resolve()
            path.exists()  # raises if the system does not allow such a name
        except (OSError, RuntimeError, ValueError):
            raise ConfigError.of(f"{text!r} cannot be resolved") from None
        below = [path.relative_to(root).parts for root in self.all if path.is_relative_to(root)]
        if not below:
            raise OutOfReach.of(
                f"{label} lies outside the folders of this page",
                remedy="Start the server with --root FOLDER to add one.",
            )
        if all(any(name.startswith(".") for name in names) for names in below):
            raise OutOfReach.of(
                f"{label} is hidden",
                "a path in which no name begins with a dot",
                "Use another path, or start the server with --root FOLDER for that folder.",
            )
        return path

    def real_for(self, key: str, text: str, label: str = "") -> Path:
        """As `checked_path`, for `text` as the value of the option or dataset key `key`. A path that exists must be of
        the kind that the key accepts.

        Raises:
            OutOfReach: as `checked_path`.
            ConfigError: it is not a valid path, or of another kind.
        """
        path = self.checked_path(text, label)
        if not self._is_of_kind(PATHS[key].kind, path):
            raise ConfigError.of(label or text, PATHS[key].kind.value)
        return path

    def refusal(self, key: str, text: str) -> Problem | None:
        """Return the problem with `text` as the value of `key`, or None. `simpletuner.config.load.examine` calls it."""
        try:
            self.real_for(key, text, f"{key} = {value_text(text)}")
        except ConfigError as error:
            return replace(error.problems[0], key=key)
        return None

    def variable(self, *extra_roots: Path) -> dict[str, str]:
        """The environment variable that limits a command's configuration to these roots and `extra_roots`."""
        return {PAGE_ROOTS_VARIABLE: json.dumps([str(root) for root in (*self.all, *extra_roots)])}

    def _is_of_kind(self, kind: PathKind, path: Path) -> bool:
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            is_file = is_folder = True  # a missing path may become either
        else:
            is_file, is_folder = stat.S_ISREG(mode), stat.S_ISDIR(mode)
        if kind is PathKind.DOCUMENT:
            return is_file and path.suffix.lower() in (".json", ".toml") and not self._is_in_a_run(path)
        if kind is PathKind.TEXTS:
            return is_file and path.suffix.lower() in (".json", ".txt") and not self._is_in_a_run(path)
        if kind is PathKind.RUN:
            return is_folder and path not in self.all and not _holds_a_config(path)
        if kind is PathKind.FOLDER:
            return is_folder
        if kind is PathKind.IMAGE:
            return is_file and path.suffix.lower() in IMAGE_SUFFIXES
        if kind is PathKind.MODEL:
            return is_folder or (is_file and is_weight_file(path.name))
        return is_folder or (is_file and path.suffix.lower() == ".safetensors")

    def _is_in_a_run(self, path: Path) -> bool:
        folders = [folder for folder in path.parents if self.contains(folder) and folder not in self.all]
        return any(RunDirectory(folder).events.exists() for folder in folders)


def _holds_a_config(folder: Path) -> bool:
    """Whether a folder other than a run's holds a configuration, which a run's own config.json would overwrite."""
    return not RunDirectory(folder).events.exists() and any((folder / name).exists() for name in CONFIG_NAMES)


def page_reach(environ: Mapping[str, str]) -> Reach | None:
    """Return the reach of a command that the page started; None if a person started it."""
    text = environ.get(PAGE_ROOTS_VARIABLE)
    if text is None:
        return None
    roots: Sequence[str] = json.loads(text)
    workspace, *others = map(Path, roots)
    return Reach(workspace, tuple(others))
