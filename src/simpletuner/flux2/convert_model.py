"""Whole transformers in two layouts: folders of diffusers', and single files of BFL's, with which ComfyUI starts.

Tensors are renamed, cut, joined and written one by one, with the bits that they have: there and back is exact.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from simpletuner.base import machine
from simpletuner.base.errors import AccessError, CheckpointError, ConfigError, DiskError, Problem
from simpletuner.base.files import file_errors_reported, sync_directory, write_json
from simpletuner.base.parts import locked_part
from simpletuner.base.sizes import format_size
from simpletuner.base.tensorfile import DTYPE_BITS, TensorData, read_header, read_headers, read_metadata, write_verified
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.configs import read_component_config
from simpletuner.flux2.footprint import empty_transformer
from simpletuner.flux2.modelfile import INDEX_NAME, TRANSFORMER_FOLDER, WEIGHTS_NAME, WEIGHTS_STEM
from simpletuner.flux2.names import Renamed, to_bfl, transformer_renaming
from simpletuner.flux2.source import Weights, transformer_spec
from simpletuner.flux2.spec import transformer_from_tensors, transformer_to_diffusers
from simpletuner.flux2.stored import FLOATING_DTYPES
from simpletuner.memory.shares import share_files
from simpletuner.memory.tensors import TensorFile, as_written, open_tensors, unreadable

MODEL_FORMATS = ("diffusers", "bfl", "comfyui")
"""What a model can be converted to. ComfyUI reads BFL's layout, so the last two are the same."""

_CONTAINER = "model.diffusion_model."
"""Before a transformer's names in a file that holds a VAE and text encoders too."""
_OTHER_COMPONENTS = ("vae.", "text_encoders.", "first_stage_model.", "cond_stage_model.")


@dataclass(frozen=True)
class ConvertedModel:
    """What `convert_model` wrote."""

    path: Path
    """The folder or file."""
    tensors: int
    bytes: int
    left_out: int
    """Tensors of the source that belong to other components: a VAE's, a text encoder's."""


@dataclass(frozen=True)
class _LazyTensor:
    """A tensor that is read when it is written."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    def changed(self, change: Callable[[Tensor], Tensor] | None) -> "_LazyTensor":
        """What `change` returns of it; itself without one."""
        return self if change is None else replace(self, read=lambda: change(self.read()))

    def written(self) -> TensorData:
        return TensorData(self.dtype, self.shape, self.size, lambda: as_written(self.read()).data())


def holds_model(path: Path) -> bool:
    """Whether `path` is a diffusers folder with a transformer, or a safetensors file with a transformer's weights; not
    of an adapter, whose tensors have other names.

    Raises:
        AccessError: a file that is no whole safetensors file.
    """
    if path.is_dir():
        return _transformer_folder(path) is not None
    names = read_header(path)
    renaming = transformer_renaming(names)
    known = [renamed.names[0] for name in names if (renamed := renaming(name)) is not None]
    return "x_embedder.weight" in known


def convert_model(
    source: Path,
    target: Path,
    to: str,
    *,
    changes: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    header: Mapping[str, str] = MappingProxyType({}),
) -> ConvertedModel:
    """Write the transformer of `source` to `target`.

    Args:
        source: a transformer's folder or that of a whole pipeline, as diffusers saves them, or a single file with BFL's
            or diffusers' names, with a prefix of ComfyUI's or without, other components beside it or not.
        target: a folder for "diffusers", a .safetensors file for the others. Nothing may lie there.
        to: one of `MODEL_FORMATS`.
        changes: what becomes of weights, by diffusers' names; each keeps its shape and dtype.
        header: fields that are added to the source's.

    Raises:
        ConfigError: `to`, or `target` does not suit it, or something is there.
        AccessError: `source` is no whole FLUX.2 transformer of plain weights; what is wrong with it is named.
        CheckpointError: weights in several files of which some are missing, or a damaged one.
        DiskError: no space, or what was written reads back differently. Nothing is left at `target`.
    """
    _check_target(target, to)
    with file_errors_reported(source, AccessError, doing="read"), _opened(source) as (stored, own, config, other):
        spec = _checked_spec(source, stored, config)
        metadata = {**own, **header}
        tensors = {name: tensor.changed(changes.get(name)) for name, tensor in stored.items()}
        found = tensors if to == "diffusers" else _in_bfl_layout(tensors)
        size = sum(tensor.size for tensor in found.values())
        room = machine.disk_room(target.parent)
        if size > room:
            raise DiskError.of(
                f"{target} takes {format_size(size)}, and {format_size(room)} are free there",
                remedy="Free some space, or give another place.",
            )
        if to == "diffusers":
            _write_folder(target, spec, found, metadata)
        else:
            if transformer_from_tensors({name: tensor.shape for name, tensor in tensors.items()}) != spec:
                raise AccessError.of(
                    f"{source} has a config.json whose axes_dims_rope, rope_theta or eps are not those of every FLUX.2",
                    "a transformer that its shapes describe: a single file holds nothing else",
                )
            _write_single(target, found, metadata)
    return ConvertedModel(target, len(found), size, other)


def save_single(folder: Path, target: Path) -> None:
    """Put a saved transformer (of one process or several) at `target` as one file in BFL's layout, in place of what was
    there. No more than one fused tensor is in memory.

    Raises:
        DiskError: no space, or the file reads back differently.
        CheckpointError: a file of the weights is missing or damaged.
    """
    with file_errors_reported(folder, CheckpointError, doing="read"):
        try:
            files = tuple(share_files(folder, WEIGHTS_STEM))
        except FileNotFoundError as error:
            raise unreadable(folder / WEIGHTS_NAME, error) from None
        with _read_lazily(files) as (tensors, metadata, _):
            _write_single(target, _in_bfl_layout(tensors), metadata)


def _check_target(target: Path, to: str) -> None:
    if to not in MODEL_FORMATS:
        raise ConfigError.of(f"a model as {to}", f"one of {', '.join(MODEL_FORMATS)}", "Only LoRAs have other formats.")
    is_file = target.suffix == ".safetensors"
    if to == "diffusers" and is_file:
        raise ConfigError.of(f"{target} is named like a file", "the name of a folder, which diffusers loads")
    if to != "diffusers" and not is_file:
        raise ConfigError.of(f"{target} does not end in .safetensors", f"the name of the single file that {to} loads")
    if os.path.lexists(target):
        raise ConfigError.of(f"{target} is there already", "a new name", "Remove it first, or choose another name.")
    if not target.absolute().parent.is_dir():
        raise ConfigError.of(f"{target.parent}: no such folder", "a folder that is there")


def _transformer_folder(path: Path) -> Path | None:
    """The folder of the transformer, where `path` is that or a pipeline's."""
    for folder in (path, path / TRANSFORMER_FOLDER):
        weights = (folder / WEIGHTS_NAME, folder / INDEX_NAME)
        if (folder / "config.json").is_file() and any(file.is_file() for file in weights):
            return folder
    return None


@contextmanager
def _opened(
    source: Path,
) -> Iterator[tuple[dict[str, _LazyTensor], Mapping[str, str], dict[str, object] | None, int]]:
    """The transformer's tensors in diffusers' names, the header's fields, its config if it has one, and how many other
    tensors there are.
    """
    if not source.is_dir():
        with _read_lazily((source,)) as (tensors, metadata, other):
            yield tensors, metadata, None, other
        return
    folder = _transformer_folder(source)
    if folder is None:
        raise AccessError.of(
            f"{source} holds no transformer", f"a folder with config.json and {WEIGHTS_NAME}, or one around it"
        )
    config = read_component_config("transformer", folder / "config.json")
    with _read_lazily(tuple(share_files(folder, WEIGHTS_STEM))) as (tensors, metadata, other):
        yield tensors, metadata, config, other


@contextmanager
def _read_lazily(files: tuple[Path, ...]) -> Iterator[tuple[dict[str, _LazyTensor], Mapping[str, str], int]]:
    """The transformer's tensors in `files`, by diffusers' names, fused ones cut; the first file's fields; how many
    tensors of other components lie beside them.
    """
    entries = read_headers(files)
    if any(name.startswith(_CONTAINER) for name in entries):
        own = {name: entry for name, entry in entries.items() if not name.startswith(_OTHER_COMPONENTS)}
    else:
        own = entries
    unknown, quantized = [], []
    tensors: dict[str, _LazyTensor] = {}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(open_tensors(file)) for file in files}
        renaming = transformer_renaming(own)
        for name, entry in own.items():
            renamed = renaming(name)
            if renamed is None:
                unknown.append(name)
                continue
            if entry.dtype not in FLOATING_DTYPES:
                quantized.append(f"{name} as {entry.dtype}")
                continue
            for index, (target, shape) in enumerate(zip(renamed.names, renamed.shapes(entry.shape), strict=True)):
                tensors[target] = _LazyTensor(entry.dtype, shape, _cutting(opened[entry.file], name, renamed, index))
        AccessError.raise_if(
            Problem(f"{files[0]}: {what} ({len(names)}): {', '.join(names[:4])}", expected, remedy)
            for names, what, expected, remedy in (
                (quantized, "quantized", "weights in bf16, fp16 or fp32", "Convert the file that is not quantized."),
                (unknown, "unknown tensors", "those of a FLUX.2 transformer", "Is this the right file?"),
            )
            if names
        )
        yield tensors, read_metadata(files[0]), len(entries) - len(own)


def _cutting(file: TensorFile, name: str, renamed: Renamed, index: int) -> Callable[[], Tensor]:
    return lambda: renamed.cut(file[name])[index]


def _checked_spec(
    source: Path, tensors: Mapping[str, _LazyTensor], config: dict[str, object] | None
) -> TransformerSpec:
    """What the transformer is made of, if it has all of its tensors and no other.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        spec = (
            transformer_from_tensors(shapes) if config is None else transformer_spec(Weights((), config), source.name)
        )
    except KeyError as error:
        raise AccessError.of(f"{source} has no tensor {error}", "a FLUX.2 transformer") from None
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise AccessError.of(f"{source}: {error}", "a FLUX.2 transformer") from None
    expected = {name: tuple(tensor.shape) for name, tensor in empty_transformer(spec).state_dict().items()}
    wrong = [name for name in expected.keys() & shapes.keys() if expected[name] != shapes[name]]
    AccessError.raise_if(
        Problem(f"{source}: {what} ({len(names)}): {', '.join(sorted(names)[:4])}", remedy="Is it whole?")
        for what, names in (
            ("missing", expected.keys() - shapes.keys()),
            ("unknown", shapes.keys() - expected.keys()),
            ("of another shape", wrong),
        )
        if names
    )
    return spec


def _in_bfl_layout(tensors: Mapping[str, _LazyTensor]) -> dict[str, _LazyTensor]:
    """`tensors`, in diffusers' names, under BFL's: query, key and value joined, the last norm's halves exchanged.

    Raises:
        AccessError: query, key and value of one layer have different dtypes, which one tensor cannot.
    """
    joined: dict[str, list[_LazyTensor | None]] = {}
    swapped = set()
    for name, tensor in tensors.items():
        place = to_bfl(name.removesuffix(".weight"))
        assert place is not None  # a FLUX.2 transformer has no other tensors
        # BFL's norms call their weights scale.
        leaf = "scale" if place.name.endswith("_norm") else "weight"
        new = f"{place.name}.{leaf}"
        joined.setdefault(new, [None] * place.parts)[place.part] = tensor
        swapped |= {new} if place.swaps_halves else set()
    found = {}
    for name, held in joined.items():
        parts = [part for part in held if part is not None]
        first = parts[0]
        if len(parts) < len(held) or any(part.dtype != first.dtype for part in parts):
            raise AccessError.of(f"{name} would be joined from parts that are missing or of different dtypes")
        shape = (first.shape[0] * len(parts), *first.shape[1:])
        found[name] = _LazyTensor(first.dtype, shape, _joining(parts, is_swapped=name in swapped))
    return found


def _joining(parts: list[_LazyTensor], *, is_swapped: bool) -> Callable[[], Tensor]:
    if is_swapped:
        (whole,) = parts
        return lambda: torch.cat(whole.read().chunk(2)[::-1])
    return lambda: parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])


def _write_single(target: Path, tensors: Mapping[str, _LazyTensor], metadata: Mapping[str, str]) -> None:
    with file_errors_reported(target), locked_part(target) as part:
        write_verified(part, {name: tensor.written() for name, tensor in tensors.items()}, metadata)
        os.replace(part, target)
        sync_directory(target.absolute().parent)


def _write_folder(
    target: Path, spec: TransformerSpec, tensors: Mapping[str, _LazyTensor], metadata: Mapping[str, str]
) -> None:
    with file_errors_reported(target), locked_part(target, is_folder=True) as part:
        write_json(part / "config.json", transformer_to_diffusers(spec))
        written = {name: tensor.written() for name, tensor in tensors.items()}
        write_verified(part / WEIGHTS_NAME, written, metadata)
        os.replace(part, target)
        sync_directory(target.absolute().parent)
