"""A transformer as files hold it: a single file or a folder, in BFL's names or diffusers', found before it is read."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import read_metadata
from simpletuner.flux2.configs import Config, read_component_config
from simpletuner.flux2.modelfile import TRANSFORMER_FOLDER, WEIGHTS_NAME, WEIGHTS_STEM
from simpletuner.flux2.names import transformer_renaming
from simpletuner.flux2.stored import StoredRows, open_stored, stored_weights
from simpletuner.memory.shares import share_files


@dataclass(frozen=True)
class OpenTransformer:
    """A transformer's weights, none of them read yet."""

    path: Path
    weights: Mapping[str, StoredRows]
    """By diffusers' names; what BFL's layout fuses is cut."""
    config: Config | None
    """None of a single file, whose shapes tell."""
    header: Mapping[str, str]
    """The text fields of its first file; none of a GGUF file."""


@contextlib.contextmanager
def opened_transformer(path: Path) -> Iterator[OpenTransformer]:
    """Open the transformer in `path`: a single file, a transformer's folder as diffusers saves it, or a pipeline's.

    Raises:
        AccessError: no transformer of FLUX.2, damaged, or in a format that cannot be read.
        CheckpointError: weights in several files of which some are missing.
    """
    with file_errors_reported(path, AccessError, doing="read"):
        folder = _folder(path)
        files = (path,) if folder is None else tuple(share_files(folder, WEIGHTS_STEM))
        stored = stored_weights(files)
        header = {} if files[0].suffix == ".gguf" else read_metadata(files[0])
    config = None if folder is None else read_component_config("transformer", folder / "config.json")
    renaming = transformer_renaming(stored)
    renamed = {name: renaming(name) for name in stored}
    unknown = [name for name, new in renamed.items() if new is None]
    names = {name for new in renamed.values() if new is not None for name in new.names}
    if unknown or "x_embedder.weight" not in names:
        found = f"tensors that are not known ({len(unknown)}), such as {unknown[0]}" if unknown else "no image embedder"
        raise AccessError.of(f"{path} has {found}", "the weights of a FLUX.2 transformer", "Is this the right file?")
    with open_stored(stored) as reader:
        weights = {
            target: rows
            for name, new in renamed.items()
            if new is not None
            for target, rows in zip(new.names, reader.parts(name, new.cut), strict=True)
        }
        yield OpenTransformer(path, weights, config, header)


def _folder(path: Path) -> Path | None:
    """The transformer's folder in a folder `path`; None of a file.

    Raises:
        AccessError: there is none.
    """
    if not path.is_dir():
        return None
    for folder in (path, path / TRANSFORMER_FOLDER):
        if (folder / "config.json").is_file() and any(folder.glob(f"{WEIGHTS_STEM}*.safetensors")):
            return folder
    raise AccessError.of(
        f"{path} holds no transformer", f"a folder with config.json and {WEIGHTS_NAME}, or one around it"
    )
