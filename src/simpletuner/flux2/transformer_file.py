"""Open a transformer in a single file or a folder, with BFL's or diffusers' names, without reading weights."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.tensorfile import read_headers, read_metadata
from simpletuner.flux2.configs import Config, read_component_config
from simpletuner.flux2.gguf_file import is_gguf
from simpletuner.flux2.modelfile import TRANSFORMER_FOLDER, WEIGHTS_NAME, WEIGHTS_STEM
from simpletuner.flux2.names import transformer_renaming
from simpletuner.flux2.stored import (
    QUANTIZATION_METADATA,
    StoredRows,
    check_format,
    component_names,
    open_stored,
    stored_weights,
)
from simpletuner.memory.shares import share_files


@dataclass(frozen=True)
class OpenTransformer:
    """An open transformer. No weight is read yet."""

    path: Path
    weights: Mapping[str, StoredRows]
    """By diffusers' names. Weights that BFL's layout fuses are split."""
    config: Config | None
    """None for a single file, whose tensor shapes determine the architecture."""
    header: Mapping[str, str]
    """Metadata of the first file's header, without `QUANTIZATION_METADATA`: callers write decoded weights. Empty for a
    GGUF file."""
    other_tensors: int
    """Number of tensors of other components, such as a VAE, in an all-in-one checkpoint."""


@contextlib.contextmanager
def opened_transformer(path: Path) -> Iterator[OpenTransformer]:
    """Open the transformer in `path`: a single file, or a transformer or pipeline folder as diffusers saves it.

    Raises:
        AccessError: `path` holds no FLUX.2 transformer, or is damaged or in an unsupported format.
        CheckpointError: some of its weight files are missing.
    """
    with file_errors_reported(path, AccessError, doing="read"):
        folder = transformer_folder(path)
        if folder is None and path.is_dir():
            raise AccessError.of(
                f"{path} holds no transformer",
                f"a folder that holds config.json and {WEIGHTS_NAME}, or its parent folder",
            )
        files = (path,) if folder is None else _weight_files(folder)
        check_format(files)
        stored = stored_weights(files)
        has_header = not is_gguf(files[0])
        header = read_metadata(files[0]) if has_header else {}
        header.pop(QUANTIZATION_METADATA, None)
        names = read_headers(files) if has_header else {}
        other_tensors = len(names) - len(component_names(names, "transformer"))
    config = None if folder is None else read_component_config("transformer", folder / "config.json")
    renaming = transformer_renaming(stored)
    renamed = {name: renaming(name) for name in stored}
    if unknown := [name for name, new in renamed.items() if new is None]:
        raise AccessError.of(
            f"{path}: unknown tensors ({len(unknown)}): {', '.join(unknown[:4])}",
            "only tensors of a FLUX.2 transformer",
            "Check that this is the right file.",
        )
    with open_stored(stored) as reader:
        weights = {
            target: rows
            for name, new in renamed.items()
            if new is not None
            for target, rows in zip(new.names, reader.parts(name, new.split), strict=True)
        }
        if "x_embedder.weight" not in weights:
            raise AccessError.of(f"{path} has no tensor 'x_embedder.weight'", "a FLUX.2 transformer")
        yield OpenTransformer(path, weights, config, header, other_tensors)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files in `folder`, which `transformer_folder` returned.

    Raises:
        AccessError: it holds only the files of a variant, such as fp16.
        CheckpointError: some of its shards are missing.
    """
    try:
        return tuple(share_files(folder, WEIGHTS_STEM))
    except FileNotFoundError:
        files = sorted(folder.glob(f"{WEIGHTS_STEM}*.safetensors"))
        raise AccessError.of(
            f"{folder} has no {WEIGHTS_NAME}, only {', '.join(file.name for file in files)}",
            "file names that diffusers loads without a variant",
            f"Give the file itself: {files[0]}" if len(files) == 1 else "Rename the files without the variant.",
        ) from None


def transformer_folder(path: Path) -> Path | None:
    """The transformer's folder: `path`, or transformer/ in a pipeline `path`; None if neither holds a transformer."""
    for folder in (path, path / TRANSFORMER_FOLDER):
        if (folder / "config.json").is_file() and any(folder.glob(f"{WEIGHTS_STEM}*.safetensors")):
            return folder
    return None
