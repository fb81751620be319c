"""Adapter files of every program: which dialect a file is in, and what it holds for each Linear.

A key is a prefix, a Linear's name in diffusers' or BFL's layout, and what the tensor is to it. Programs differ in all
three, and files of several tools mix them: each key is read for itself.
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
"""What programs put before a Linear's name."""

_LORA_SUFFIX = re.compile(
    r"[._](?:(?P<peft>lora_)(?P<side>[AB])(?P<adapter>\.(?!(?:weight|bias)$)\w+)?"
    r"|(?P<kohya>lora_|lora\.|lora_linear_layer\.)(?P<way>down|up))(?:\.weight)?$"
)
"""A LoRA's two matrices: PEFT's A and B, with or without an adapter's name, or down and up."""
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
"""Dialects that have a name, by prefix, layout and the spelling of the matrix that reads the input. LoKr and LoHa files
take the first name of their prefix and layout.
"""


def prefix_of(key: str) -> str:
    """What stands before a Linear's name in a key of an adapter file; empty where that begins it."""
    return next(prefix for prefix in ADAPTER_PREFIXES if key.startswith(prefix))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file's content."""

    path: Path
    dialect: str
    """The layout of its keys, such as "diffusers", "comfyui", "kohya"; "mixed" where it has several. One without a name
    is shown as a pattern, such as "unet.<bfl>.lora_A".
    """
    modules: dict[str, Factors]
    """By diffusers' name of the Linear, fused matrices cut; in the file's numbers and dtype, fp8 in bf16."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys that are part of no factors above, each with what it is: "dora", "oft", "diff", "text encoder" or "unknown".
    """
    header: Mapping[str, str] = field(default_factory=dict)
    """The file's text fields."""
    header_scaled: frozenset[str] = frozenset()
    """Modules that the header gives a scale other than 1, by an alpha that no key has. ComfyUI reads no header."""
    dialects: tuple[str, ...] = ()
    """Of a mixed file, those that it mixes."""


class _KeyParts(NamedTuple):
    """A key in three."""

    stem: str
    """Prefix and module."""
    suffix: str
    """What the tensor is to the module, such as "alpha", or "A" and "B" of a LoRA; "" where nothing says so."""
    spelling: str = ""
    """Of a LoRA's pair: how the file spells the matrix that reads the input."""


@dataclass
class _KeyGroup:
    """The keys of one module in the file, as the file calls it."""

    stem: str
    prefix: str
    layout: NamingLayout
    name: str
    """Of the module in `layout`, with dots."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By suffix; a LoRA's matrices as "A" and "B"."""
    keys: dict[str, str] = field(default_factory=dict)
    """Of the same, in the file."""
    spelling: str = ""
    """As in `_KeyParts`."""


def read_adapter(path: Path) -> AdapterFile:
    """The adapter in `path`, a file or a folder that holds `pytorch_lora_weights.safetensors`.

    alpha is that of a key, else that of PEFT's header, else the rank. Our own files have it folded in, and their header
    is not asked.

    Raises:
        CheckpointError: no such file, damaged, with an alpha or factors that make no adapter, or with no key that names
            a module of FLUX.2.
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
        if kinds or group.tensors.keys() == {"alpha"}:  # a DoRA's A and B mean nothing without its magnitudes
            unread |= dict.fromkeys(group.keys.values(), kinds[0] if kinds else "unknown")
            groups.remove(group)
    _check_groups(path, groups)
    header_scale = HeaderScale(path, {} if "simpletuner.alpha" in header else header)
    modules: dict[str, Factors] = {}
    stems: dict[str, str] = {}
    header_scaled: set[str] = set()
    for group in groups:
        for name, factors in _cut(path, group, _factors(path, group, header_scale)).items():
            if name in modules:
                raise CheckpointError.of(
                    f"{path} has {name} twice, as {stems[name]} and as {group.stem}",
                    "each Linear once",
                    "It was put together from two files: take one of them.",
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
    """Raise where `file` holds more than `AdapterFile.modules` says and what a text encoder would take.

    Raises:
        CheckpointError: keys of a kind that is not read, with what reads it.
    """
    problems = []
    for kind in dict.fromkeys(file.unread.values()):
        keys = [key for key, each in file.unread.items() if each == kind]
        if kind == "unknown":
            problems.append(
                Problem(
                    f"{file.path} has {len(keys)} keys that are not known, such as {keys[0]}",
                    "an adapter of FLUX.2's Linears",
                    "Made for another model, such as FLUX.1, it does not work here; else export it again without them.",
                )
            )
        elif kind != "text encoder":
            marks = [(key, suffix) for key in keys if (suffix := _parsed(key).suffix) in UNREAD_SUFFIXES]
            key, suffix = marks[0]
            found = UNREAD_SUFFIXES[suffix]
            problems.append(
                Problem(
                    f"{file.path} holds {found.title} in {len(keys)} keys, such as {key}",
                    "LoRA, LoKr or LoHa",
                    f"It acts in {found.readers}: merge it into the base there.",
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
    """The keys of each module of FLUX.2, and what the others are."""
    groups: dict[str, _KeyGroup] = {}
    unread = {}
    for key, stored in tensors.items():
        is_byte = stored.is_floating_point() and stored.itemsize == 1  # torch computes nothing in fp8
        tensor = stored.to(torch.bfloat16) if is_byte else stored
        stem, suffix, spelling = _parsed(key)
        prefix = prefix_of(stem)
        known = known_module(stem.removeprefix(prefix)) if suffix else None
        is_norm = known is not None and "norm" in known[1].rpartition(".")[2]
        if known is None or (is_norm and suffix not in UNREAD_SUFFIXES):
            unread[key] = "text encoder" if suffix and _TEXT_ENCODER.match(stem + ".") else "unknown"
            continue
        group = groups.setdefault(stem, _KeyGroup(stem, prefix, *known))
        if suffix in group.keys:
            raise CheckpointError.of(
                f"{path} has two matrices for one, {group.keys[suffix]} and {key}", "one adapter", SAVE_AGAIN
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
    """Raise where tensors are no floating-point numbers, or a LoRA's two matrices do not fit."""
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
        problems.append(Problem(f"{path} has {counted} without a matching lora_A and lora_B", "a whole LoRA"))
    if empty:
        found = f"{path} has {len(empty)} empty layers, such as {empty[0]}"
        problems.append(Problem(found, "a rank of at least 1", SAVE_AGAIN))
    CheckpointError.raise_if(problems)


def _factors(path: Path, group: _KeyGroup, header_scale: HeaderScale) -> Factors:
    """What `group` holds, of the whole matrix as the file has it.

    Raises:
        CheckpointError: it makes no factors.
    """
    alpha = None
    if "alpha" in group.tensors:
        if group.tensors["alpha"].numel() != 1:
            shape = "×".join(map(str, group.tensors["alpha"].shape))
            raise CheckpointError.of(f"{path}: {group.keys['alpha']} is {shape}", "a single number", SAVE_AGAIN)
        alpha = float(group.tensors["alpha"])
    try:
        others = factors_of(group.tensors, alpha)
        if others is not None and group.tensors.keys() & {"A", "B"}:
            raise ValueError("a LoRA's matrices beside those of another kind")
    except ValueError as error:
        raise CheckpointError.of(
            f"{path}: {group.stem} has {error}", "the factors of one adapter", SAVE_AGAIN
        ) from None
    if others is not None:
        return others
    a, b = group.tensors["A"], group.tensors["B"]
    rank = a.shape[0]
    if alpha is None:
        return LowRank(a, b, header_scale(group.name, rank))
    return LowRank(a, b, checked_alpha(path, group.keys["alpha"], alpha, place="") / rank)


def _cut(path: Path, group: _KeyGroup, factors: Factors) -> dict[str, Factors]:
    """`factors` by diffusers' names of the Linears that its rows are."""
    renamed = from_bfl(f"{group.name}.weight") if group.layout == "bfl" else None
    if renamed is None:
        return {group.name: factors}
    cut: dict[str, Factors] = {}
    rows = factors.shape[0]
    for name in (each.removesuffix(".weight") for each in renamed.names):
        place = to_bfl(name)
        assert place is not None
        if rows % (2 if place.swaps_halves else place.parts):
            raise CheckpointError.of(
                f"{path}: {group.stem} has {rows} rows", "equal parts of a fused matrix", SAVE_AGAIN
            )
        ranges: list[RowRange] = []
        if place.swaps_halves:
            ranges = [(rows // 2, rows), (0, rows // 2)]
        elif place.parts > 1:
            part = rows // place.parts
            ranges = [(place.part * part, (place.part + 1) * part)]
        cut[name] = factors.taken(ranges) if ranges else factors
    return cut


def _check_modules(path: Path, modules: Mapping[str, Factors], unread: Mapping[str, str]) -> None:
    """Raise where nothing is of FLUX.2, or a factor has numbers that are none."""
    if not modules and not set(unread.values()) & {"dora", "oft", "diff"}:
        if not unread:
            raise CheckpointError.of(f"{path} has no layers", "a whole LoRA")
        keys = [key for key, kind in unread.items() if kind == "unknown"]
        found = f"none of its {len(unread)} keys names a layer of FLUX.2"
        raise CheckpointError.of(
            f"{path}: {found}; they are {_described(keys[0])}" if keys else f"{path}: {found}, only of a text encoder",
            "a LoRA of FLUX.2's transformer",
            "It was made for another model, or it is no LoRA.",
        )
    damaged = [
        name
        for name, factors in modules.items()
        if any(isinstance(value, Tensor) and non_finite_count(value) for value in vars(factors).values())
    ]
    if damaged:
        raise CheckpointError.of(
            f"{path}: NaN or infinite numbers in {len(damaged)} of {len(modules)} layers, such as {damaged[0]}",
            "finite weights",
            "The file is damaged or was saved from a run that diverged: take an earlier checkpoint.",
        )


def _described(key: str) -> str:
    """`key`, and what it is by its spelling."""
    stem, suffix, _ = _parsed(key)
    prefix = prefix_of(stem)
    if not suffix:
        return f"such as {key}"
    kind = (
        "a LoRA" if suffix in ("A", "B", "alpha") else "a LoKr or LoHa" if suffix in FACTOR_SUFFIXES else "an adapter"
    )
    return f"those of {kind}" + (f" under {prefix}" if prefix else "") + f", such as {key}"
