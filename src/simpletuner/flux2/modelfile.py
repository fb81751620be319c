"""Save and read transformers in the layout that diffusers loads, and save complete pipelines around them.

Tensors keep diffusers' names throughout.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported, link_or_copy, sync_directory, write_json
from simpletuner.base.tensorfile import read_headers
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.configs import read_index, read_object
from simpletuner.flux2.export import header_of
from simpletuner.flux2.single import open_component
from simpletuner.flux2.source import Source
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.memory.shares import RankTensor, load_shares, write_shares
from simpletuner.memory.tensors import save_tensors, save_verified, unreadable_file_error
from simpletuner.memory.world import World

TRANSFORMER_FOLDER = "transformer"
WEIGHTS_STEM = "diffusion_pytorch_model"
WEIGHTS_NAME = f"{WEIGHTS_STEM}.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
"""Maps tensors to files if the weights are in several files."""
PIPELINE_INDEX = "model_index.json"
_BATCH_COUNT = "bn.num_batches_tracked"
"""BFL's VAE files may lack this tensor. Nothing reads it."""
COPIED_BYTES = 2**20
"""Files up to this size are copied into a model folder; larger files are linked."""


def save_transformer(
    folder: Path,
    spec: TransformerSpec,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> None:
    """Write a transformer's config and weights into `folder`, read the weights back and compare them.

    Args:
        metadata: fields of `export.HEADER_FIELDS`.
        dtype: dtype of the tensors in the file.

    Raises:
        DiskError: no space, or the file reads back differently.
    """
    path = folder / WEIGHTS_NAME
    with file_errors_reported(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", transformer_to_diffusers(spec))
    save_verified(path, tensors, header_of(metadata), dtype)


def save_transformer_shares(
    folder: Path,
    spec: TransformerSpec,
    tensors: Mapping[str, RankTensor],
    world: World,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> dict[str, str]:
    """Like `save_transformer`, but each rank writes one file. Rank 0 also writes the index that diffusers reads.

    Returns the SHA-256 of this rank's file, by the file's name.

    Raises:
        OSError, DiskError: as `write_shares`.
    """
    if world.rank < world.writing_ranks:
        # If this fails, writing the file fails too, but only after this rank has taken part in the gathers.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    hashes, files = write_shares(folder, WEIGHTS_STEM, tensors, header_of(metadata), world, dtype)
    if world.is_main:
        write_json(folder / "config.json", transformer_to_diffusers(spec))
        total = sum(math.prod(tensor.shape) for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX_NAME, index)
    return hashes


def read_transformer(folder: Path) -> dict[str, Tensor]:
    """The tensors that `save_transformer` or `save_transformer_shares` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_shares(folder, WEIGHTS_STEM)
    except OSError as error:
        raise unreadable_file_error(folder / WEIGHTS_NAME, error) from None


def save_pipeline(folder: Path, transformer: Path, source: Source) -> str | None:
    """Write a diffusers pipeline around a saved transformer.

    An existing `folder` is replaced once the new one is complete. It holds the files of `transformer` and, from
    `source`, all other files of a diffusers pipeline: small files as copies, large files as hard links, or as symbolic
    links if they are on another disk.

    Returns:
        Why `folder` holds only the transformer; None if it is a complete pipeline.

    Raises:
        DiskError: no space.
    """
    part, old = folder.with_name(f".tmp-{folder.name}"), folder.with_name(f".tmp-old-{folder.name}")
    with file_errors_reported(folder):
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir(parents=True)
        (part / TRANSFORMER_FOLDER).mkdir()
        for file in _files_of(transformer):
            link_or_copy(file, part / TRANSFORMER_FOLDER / file.name)
        reason = _incomplete(source)
        if reason is None:
            _add_components(part, source)
        sync_directory(part)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        sync_directory(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    return reason


def _incomplete(source: Source) -> str | None:
    """Why the files on this disk do not form a complete pipeline; None if they do."""
    base = source.pipeline
    if base is None:
        return f"only the files of {source.name} that training needs were downloaded"
    if not (base / PIPELINE_INDEX).is_file() or not (base / "scheduler").is_dir():
        return f"{base} is not a complete pipeline"
    encoder_files = source.text_encoder.files
    encoder = encoder_files[0].parent
    index = encoder / "model.safetensors.index.json"
    config = base / "text_encoder" / "config.json"
    try:
        shards = read_index(index).values() if index.is_file() else ()
        architectures = read_object(config).get("architectures") if config.is_file() else None
    except AccessError as error:  # in a file that training does not need
        return error.problems[0].found
    if not all((encoder / shard).is_file() for shard in shards):
        return "the text encoder's last layers, which training does not need, are not on this disk"
    if not (encoder / "config.json").is_file() or not all(file.name.startswith("model") for file in encoder_files):
        return f"its text encoder is the single file {encoder_files[0].name}, not a diffusers folder"
    if not config.is_file() or architectures != (source.text_encoder.config or {}).get("architectures"):
        return f"its text encoder has a different architecture from that of {base}"
    return None


def _add_components(part: Path, source: Source) -> None:
    """Add the pipeline's other components, each from the folder that the run used."""
    assert source.pipeline is not None
    shutil.copyfile(source.pipeline / PIPELINE_INDEX, part / PIPELINE_INDEX)
    folders = {
        "scheduler": source.pipeline / "scheduler",
        "tokenizer": source.tokenizer,
        "text_encoder": source.text_encoder.files[0].parent,
    }
    for name, folder in folders.items():
        (part / name).mkdir()
        for file in _files_of(folder):
            _add(file, part / name / file.name)
    _add_vae(part / "vae", source)


def _add_vae(part: Path, source: Source) -> None:
    """Add the VAE, which may come from a single file, or from the root of another repository."""
    part.mkdir()
    files, config = source.vae.files, part / "config.json"
    folder = files[0].parent
    if (folder / config.name).is_file():
        for file in _files_of(folder):
            if file.suffix != ".safetensors":
                _add(file, part / file.name)
    with open_component(files, "vae") as tensors:
        if tensors.keys() == read_headers(files).keys():
            for file in files:
                _add(file, part / (WEIGHTS_NAME if len(files) == 1 else file.name))
        else:  # other tensor names, or other components in the file
            bn = {_BATCH_COUNT: torch.zeros((), dtype=torch.int64)}
            save_tensors(part / WEIGHTS_NAME, bn | {name: read() for name, read in tensors.items()}, {"format": "pt"})
    if not config.exists() or read_object(config) != source.vae.config:
        write_json(config, source.vae.config)


def _files_of(folder: Path) -> list[Path]:
    """Files in `folder`, hidden ones left out, sorted by name."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]


def _add(file: Path, target: Path) -> None:
    """Copy or link a file of the base model."""
    if file.stat().st_size <= COPIED_BYTES:
        shutil.copyfile(file, target)
        return
    file = file.resolve()
    try:
        os.link(file, target)
    except OSError:  # another disk, another user's file, or a file system without hard links
        target.symlink_to(file)
