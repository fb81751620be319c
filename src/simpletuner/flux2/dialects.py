"""Read adapter files of every program: identify the dialect, and return the factors for each Linear.

A key consists of a prefix, a Linear's name in diffusers' or BFL's layout, and a suffix for the tensor's role. Programs
differ in all three, and files processed by several tools mix them, so each key is parsed on its own.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simpletuner.base.errors import CheckpointError, Problem
from simpletuner.base.files import file_errors_reported
from simpletuner.flux2.adapter_kinds import FACTOR_SUFFIXES, UNREAD_SUFFIXES, factors_of
from simpletuner.flux2.factors import Factors, LowRank, RowRange
from simpletuner.flux2.header_alpha import SAVE_AGAIN, HeaderScale, checked_alpha
from simpletuner.flux2.names import NamingLayout, from_bfl, known_module, to_bfl
from simpletuner.memory.tensors import non_finite_count, open_tensors
from simpletuner.runs.layout import LORA_NAME

ADAPTER_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)
"""Prefixes that programs put before a Linear's name."""

_LORA_SUFFIX = re.compile(
    r"[._](?:(?P<peft>lora_)(?P<side>[AB])(?P<adapter>\.(?!(?:weight|bias)$)\w+)?"
    r"|(?P<kohya>lora_|lora\.|lora_linear_layer\.)(?P<way>down|up))(?:\.weight)?$"
)
"""Suffixes of a LoRA's two matrices: PEFT's A and B, with or without an adapter name, or down and up."""
_KNOWN_SUFFIXES = FACTOR_SUFFIXES | UNREAD_SUFFIXES.keys() | {"alpha"}
_TEXT_ENCODER = re.compile(
    r"(?:lora_|lycoris_)?te\d*[._]|(?:base_model\.model\.)?text_encoders?(?:_\d)?[._]"
    r"|.*(?:\b|_)layers[._]\d+[._](?:self_attn|mlp)[._]"
)

_DIALECTS: Mapping[tuple[str, NamingLayout], Mapping[str, str]] = {
    ("transformer.", "diffusers"): {
        "lora_A": "diffusers",
        "lora_down": "onetrainer-legacy",
        "lora.down": "diffusers-old",
    },
    ("diffusion_model.", "bfl"): {"lora_A": "comfyui"},
    ("base_model.model.", "bfl"): {"lora_A": "bfl"},
    ("base_model.model.", "diffusers"): {"lora_A": "peft"},
    ("lora_unet_", "bfl"): {"lora_down": "kohya"},
    ("lora_transformer_", "diffusers"): {"lora_down": "onetrainer"},
    ("", "bfl"): {"lora_A": "onetrainer-original"},
    ("", "diffusers"): {"lora_A.default": "diffsynth"},
    ("lycoris_", "diffusers"): {"lora_down": "lycoris"},
    ("lycoris_", "bfl"): {"lora_down": "lycoris-bfl"},
}
"""Names of dialects, by prefix, layout and spelling of the matrix that multiplies the input. LoKr and LoHa files take
the first name of their prefix and layout.
"""


def prefix_of(key: str) -> str:
    """The prefix of an adapter file's key; empty if the key begins with the Linear's name."""
    return next(prefix for prefix in ADAPTER_PREFIXES if key.startswith(prefix))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file's content."""

    path: Path
    dialect: str
    """Dialect of its keys, such as "diffusers", "comfyui" or "kohya"; "mixed" if there are several. A dialect without a
    name appears as a pattern, such as "unet.<bfl>.lora_A".
    """
    modules: dict[str, Factors]
    """Factors by diffusers' name of the Linear. Fused matrices are split. Values and dtype are the file's, but fp8 is
    cast to bf16.
    """
    unread: dict[str, str] = field(default_factory=dict)
    """Keys that `modules` does not include, with their kind: "dora", "oft", "diff", "text encoder" or "unknown"."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Text fields of the file's header."""
    header_scaled: frozenset[str] = frozenset()
    """Modules whose scale is not 1 and comes from an alpha in the header. ComfyUI does not read the header."""
    dialects: tuple[str, ...] = ()
    """The dialects of a mixed file; else empty."""


class _KeyParts(NamedTuple):
    """The parts of a parsed key."""

    stem: str
    """Prefix and module name."""
    suffix: str
    """Role of the tensor, such as "alpha", or "A" and "B" of a LoRA; "" if the key has no known suffix."""
    spelling: str = ""
    """LoRA only: how the file spells the matrix that multiplies the input."""


@dataclass
class _KeyGroup:
    """The tensors of one module, under one of its names in the file."""

    stem: str
    prefix: str
    layout: NamingLayout
    name: str
    """The module's name in `layout`, with dots."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by suffix; a LoRA's matrices as "A" and "B"."""
    keys: dict[str, str] = field(default_factory=dict)
    """The file's keys of `tensors`, by suffix."""
    spelling: str = ""
    """As in `_KeyParts`."""


def read_adapter(path: Path) -> AdapterFile:
    """Read the adapter in `path`, a file or a folder that holds `pytorch_lora_weights.safetensors`.

    alpha comes from a key, else from PEFT's header, else it is the rank. Our own files fold alpha into B, so their
    header's alpha is ignored.

    Raises:
        CheckpointError: the file is missing or damaged, its alpha or factors are invalid, or no key names a module of
            FLUX.2.
    """
    with file_errors_reported(path, CheckpointError, doing="read"):
        path = path / LORA_NAME if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError.of(f"no LoRA at {path}", "a .safetensors file or a run's folder")
        with open_tensors(path) as file:
            tensors, header = dict(file), file.metadata
    groups, unread = _grouped(path, tensors)
    names = tuple(dict.fromkeys(_dialect(group) for group in groups))
    for group in list(groups):
        kinds = [UNREAD_SUFFIXES[suffix].name for suffix in group.tensors if suffix in UNREAD_SUFFIXES]
        if kinds or group.tensors.keys() == {"alpha"}:  # a DoRA's A and B are useless without its magnitudes
            unread |= dict.fromkeys(group.keys.values(), kinds[0] if kinds else "unknown")
            groups.remove(group)
    _check_groups(path, groups)
    header_scale = HeaderScale(path, {} if "simpletuner.alpha" in header else header)
    modules: dict[str, Factors] = {}
    stems: dict[str, str] = {}
    header_scaled: set[str] = set()
    for group in groups:
        for name, factors in _split_by_linear(path, group, _factors(path, group, header_scale)).items():
            if name in modules:
                raise CheckpointError.of(
                    f"{path} has {name} twice, as {stems[name]} and as {group.stem}",
                    "each Linear once",
                    "It was merged from two files: use one of them.",
                )
            modules[name], stems[name] = factors, group.stem
            if factors.scale != 1 and "alpha" not in group.tensors:
                header_scaled.add(name)
    _check_modules(path, modules, unread)
    if header_scale.is_dora and modules:
        raise CheckpointError.of(f"{path} was trained with use_dora and has no magnitudes", "an ordinary LoRA")
    return AdapterFile(
        path=path,
        dialect=names[0] if len(names) == 1 else "mixed",
        modules=modules,
        unread=unread,
        header=header,
        header_scaled=frozenset(header_scaled),
        dialects=names if len(names) > 1 else (),
    )


def check_all_read(file: AdapterFile) -> None:
    """Check that `file` has no unread keys other than those of a text encoder.

    Raises:
        CheckpointError: the file has keys of an unsupported kind. The message names the programs that support it.
    """
    problems = []
    for kind in dict.fromkeys(file.unread.values()):
        keys = [key for key, each in file.unread.items() if each == kind]
        if kind == "unknown":
            problems.append(
                Problem(
                    f"{file.path} has {len(keys)} unknown keys, such as {keys[0]}",
                    "an adapter of FLUX.2's Linears",
                    "If it is for another model, such as FLUX.1, it cannot be used; else export it again without them.",
                )
            )
        elif kind != "text encoder":
            unsupported = [(key, suffix) for key in keys if (suffix := _parsed(key).suffix) in UNREAD_SUFFIXES]
            key, suffix = unsupported[0]
            unread_kind = UNREAD_SUFFIXES[suffix]
            problems.append(
                Problem(
                    f"{file.path} holds {unread_kind.title} in {len(keys)} keys, such as {key}",
                    "LoRA, LoKr or LoHa",
                    f"{unread_kind.readers} can apply it: merge it into the base model there.",
                )
            )
    CheckpointError.raise_if(problems)


def _parsed(key: str) -> _KeyParts:
    lora = _LORA_SUFFIX.search(key)
    if lora is not None:
        spelling = "lora_A" + (".default" if lora["adapter"] else "") if lora["peft"] else f"{lora['kohya']}down"
        return _KeyParts(key[: lora.start()], lora["side"] or ("A" if lora["way"] == "down" else "B"), spelling)
    pieces = key.split(".")
    for size in (3, 2, 1):
        suffix = ".".join(pieces[-size:])
        if suffix in _KNOWN_SUFFIXES and len(pieces) > size:
            return _KeyParts(key[: -len(suffix) - 1], suffix)
    return _KeyParts(key, "")


def _grouped(path: Path, tensors: Mapping[str, Tensor]) -> tuple[list[_KeyGroup], dict[str, str]]:
    """The tensors grouped by FLUX.2 module, and the kinds of all other keys."""
    groups: dict[str, _KeyGroup] = {}
    unread = {}
    for key, stored in tensors.items():
        is_fp8 = stored.is_floating_point() and stored.itemsize == 1  # torch has no arithmetic in fp8
        tensor = stored.to(torch.bfloat16) if is_fp8 else stored
        stem, suffix, spelling = _parsed(key)
        prefix = prefix_of(stem)
        module = known_module(stem.removeprefix(prefix)) if suffix else None
        is_norm = module is not None and "norm" in module[1].rpartition(".")[2]
        if module is None or (is_norm and suffix not in UNREAD_SUFFIXES):
            unread[key] = "text encoder" if suffix and _TEXT_ENCODER.match(stem + ".") else "unknown"
            continue
        group = groups.setdefault(stem, _KeyGroup(stem, prefix, *module))
        if suffix in group.keys:
            raise CheckpointError.of(
                f"{path} has the same matrix twice, as {group.keys[suffix]} and as {key}", "one adapter", SAVE_AGAIN
            )
        group.tensors[suffix], group.keys[suffix] = tensor, key
        group.spelling = spelling or group.spelling
    return list(groups.values()), unread


def _dialect(group: _KeyGroup) -> str:
    names = _DIALECTS.get((group.prefix, group.layout), {})
    if group.spelling:
        return names.get(group.spelling) or f"{group.prefix}<{group.layout}>.{group.spelling}"
    return next(iter(names.values()), f"{group.prefix}<{group.layout}>")


def _check_groups(path: Path, groups: Iterable[_KeyGroup]) -> None:
    """Raise if a tensor is not floating-point, or if the two matrices of a LoRA layer do not fit together."""
    problems = []
    broken, empty = [], []
    for group in groups:
        problems += [
            Problem(
                f"{path} holds {group.keys[suffix]} as {tensor.dtype}",
                "floating-point weights",
                "Export it again without quantization.",
            )
            for suffix, tensor in group.tensors.items()
            if suffix != "alpha" and not tensor.is_floating_point()
        ]
        if group.tensors.keys() & FACTOR_SUFFIXES:
            continue
        a, b = group.tensors.get("A"), group.tensors.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            broken.append(group.stem)
        elif not a.numel() or not b.numel():
            empty.append(f"{group.stem} with a lora_A of {'×'.join(map(str, a.shape))}")
    if broken:
        counted = broken[0] if len(broken) == 1 else f"{len(broken)} layers, such as {broken[0]},"
        problems.append(Problem(f"{path} has {counted} without a matching lora_A and lora_B", "a complete LoRA"))
    if empty:
        message = f"{path} has {len(empty)} empty layers, such as {empty[0]}"
        problems.append(Problem(message, "a rank of at least 1", SAVE_AGAIN))
    CheckpointError.raise_if(problems)


def _factors(path: Path, group: _KeyGroup, header_scale: HeaderScale) -> Factors:
    """The factors in `group`, for the matrix as the file stores it: fused matrices are not split yet.

    Raises:
        CheckpointError: the tensors are not valid factors.
    """
    alpha = None
    if "alpha" in group.tensors:
        if group.tensors["alpha"].numel() != 1:
            shape = "×".join(map(str, group.tensors["alpha"].shape))
            raise CheckpointError.of(f"{path}: {group.keys['alpha']} is {shape}", "a single number", SAVE_AGAIN)
        alpha = float(group.tensors["alpha"])
    try:
        other_factors = factors_of(group.tensors, alpha)
        if other_factors is not None and group.tensors.keys() & {"A", "B"}:
            raise ValueError("matrices of a LoRA together with those of another kind")
    except ValueError as error:
        raise CheckpointError.of(
            f"{path}: {group.stem} has {error}", "the factors of one adapter", SAVE_AGAIN
        ) from None
    if other_factors is not None:
        return other_factors
    a, b = group.tensors["A"], group.tensors["B"]
    rank = a.shape[0]
    if alpha is None:
        return LowRank(a, b, header_scale(group.name, rank))
    return LowRank(a, b, checked_alpha(path, group.keys["alpha"], alpha, location="") / rank)


def _split_by_linear(path: Path, group: _KeyGroup, factors: Factors) -> dict[str, Factors]:
    """`factors` split by rows into diffusers' Linears, by their names."""
    renamed = from_bfl(f"{group.name}.weight") if group.layout == "bfl" else None
    if renamed is None:
        return {group.name: factors}
    split_factors: dict[str, Factors] = {}
    rows = factors.shape[0]
    for name in (each.removesuffix(".weight") for each in renamed.names):
        bfl_module = to_bfl(name)
        assert bfl_module is not None
        if rows % (2 if bfl_module.swaps_halves else bfl_module.parts):
            raise CheckpointError.of(
                f"{path}: {group.stem} has {rows} rows", "equal parts of a fused matrix", SAVE_AGAIN
            )
        ranges: list[RowRange] = []
        if bfl_module.swaps_halves:
            ranges = [(rows // 2, rows), (0, rows // 2)]
        elif bfl_module.parts > 1:
            part_rows = rows // bfl_module.parts
            ranges = [(bfl_module.part * part_rows, (bfl_module.part + 1) * part_rows)]
        split_factors[name] = factors.selected_rows(ranges) if ranges else factors
    return split_factors


def _check_modules(path: Path, modules: Mapping[str, Factors], unread: Mapping[str, str]) -> None:
    """Raise if no key names a layer of FLUX.2, or if a factor has NaN or infinite values."""
    if not modules and not set(unread.values()) & {"dora", "oft", "diff"}:
        if not unread:
            raise CheckpointError.of(f"{path} has no layers", "a complete LoRA")
        keys = [key for key, kind in unread.items() if kind == "unknown"]
        message = f"none of its {len(unread)} keys names a layer of FLUX.2"
        raise CheckpointError.of(
            f"{path}: {message}; {_described(keys[0])}" if keys else f"{path}: {message}; all are for a text encoder",
            "a LoRA of FLUX.2's transformer",
            "The file is for another model or is not a LoRA.",
        )
    damaged = [
        name
        for name, factors in modules.items()
        if any(isinstance(value, Tensor) and non_finite_count(value) for value in vars(factors).values())
    ]
    if damaged:
        raise CheckpointError.of(
            f"{path}: NaN or infinite values in {len(damaged)} of {len(modules)} layers, such as {damaged[0]}",
            "finite weights",
            "The file is damaged or was saved from a run that diverged: use an earlier checkpoint.",
        )


def _described(key: str) -> str:
    """End of an error message: `key` as an example, and the kind of adapter that its suffix suggests."""
    stem, suffix, _ = _parsed(key)
    prefix = prefix_of(stem)
    if not suffix:
        return f"one is {key}"
    kind = (
        "a LoRA" if suffix in ("A", "B", "alpha") else "a LoKr or LoHa" if suffix in FACTOR_SUFFIXES else "an adapter"
    )
    return f"they are those of {kind}" + (f" under {prefix}" if prefix else "") + f", such as {key}"
