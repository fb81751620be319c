"""Write LoRAs in diffusers', ComfyUI's, BFL's and kohya's formats, and report which layers each loader loses.

Conversions are exact: the effect is the same, and a conversion back to our format restores it bit for bit. For BFL's
layout, query, key and value are fused as in `flux2.fused` and the halves of the last modulation are swapped. alpha/rank
is folded into B, because loaders disagree about where alpha is stored.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from simpletuner.base.errors import CheckpointError, DiskError
from simpletuner.base.files import file_errors_reported
from simpletuner.base.parts import locked_part
from simpletuner.config.options.lora import LoraFormat
from simpletuner.config.values import join_names
from simpletuner.flux2.dialects import AdapterFile, check_all_read, read_adapter
from simpletuner.flux2.factors import LowRank
from simpletuner.flux2.fused import FUSED_RANKS, fused, fused_groups, fused_ranks, unfused
from simpletuner.flux2.header_alpha import ADAPTER_METADATA
from simpletuner.flux2.loaders import ADAPTER_LOADERS, AdapterLoader, loader_verdicts
from simpletuner.flux2.names import to_bfl
from simpletuner.memory.tensors import save_verified

PRESERVED_METADATA = f"simpletuner.{ADAPTER_METADATA}"
"""Header field that preserves `ADAPTER_METADATA` in files of other formats. Diffusers must not read it there: its names
and ranks are those of diffusers' format."""

LayerLoss = Literal["dropped", "wrong"]
"""How a loader fails on a layer: "dropped" ignores it, "wrong" applies a different delta."""


@dataclass(frozen=True)
class LoraLayout:
    """Spelling of the keys of a format."""

    prefix: str
    is_bfl: bool
    """Whether modules have BFL's names and fused matrices; else diffusers'."""
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    is_flat: bool = False
    """Whether module names have underscores for dots, as in kohya's scripts."""
    has_alpha: bool = False
    """Whether a separate key holds alpha, which equals the rank."""
    readers: tuple[AdapterLoader, ...] = ADAPTER_LOADERS
    """The loaders that support the format."""

    def keys(self, stem: str) -> tuple[str, ...]:
        """Keys of a module's factors a and b, and of its alpha if the format has such a key."""
        key = self.prefix + (stem.replace(".", "_") if self.is_flat else stem)
        return (key + self.down, key + self.up, *([f"{key}.alpha"] if self.has_alpha else ()))


LORA_FORMATS: Mapping[LoraFormat, LoraLayout] = {
    "diffusers": LoraLayout("transformer.", is_bfl=False),
    "comfyui": LoraLayout("diffusion_model.", is_bfl=True),
    "bfl": LoraLayout("base_model.model.", is_bfl=True, readers=("diffusers",)),
    "kohya": LoraLayout("lora_unet_", True, ".lora_down.weight", ".lora_up.weight", is_flat=True, has_alpha=True),
}


def lost_layers(modules: Iterable[str], lora_format: LoraFormat) -> dict[AdapterLoader, dict[str, LayerLoss]]:
    """The layers that each loader drops or misapplies, of a LoRA on `modules` (diffusers' names) in `lora_format`."""
    names = list(modules)
    layout = LORA_FORMATS[lora_format]
    stems = [bfl_module.name if layout.is_bfl and (bfl_module := to_bfl(name)) else name for name in names]
    verdicts = loader_verdicts([key for stem in stems for key in layout.keys(stem)], names)
    losses_by_loader: dict[AdapterLoader, dict[str, LayerLoss]] = {}
    for loader, verdict in verdicts.items():
        dropped = names if verdict.refusal else verdict.dropped
        losses_by_loader[loader] = dict.fromkeys(dropped, "dropped")
        losses_by_loader[loader] |= dict.fromkeys(verdict.wrong, "wrong")
    return losses_by_loader


def lost_layer_messages(modules: Collection[str], lora_format: LoraFormat) -> dict[AdapterLoader, str]:
    """A message for each loader that loses layers of a LoRA on `modules` in `lora_format`.

    It states the number of lost layers with an example, and the formats in which the loader reads all layers.
    """
    texts = {}
    for loader, layer_losses in lost_layers(modules, lora_format).items():
        if not layer_losses:
            continue
        lossless_formats = [candidate for candidate in LORA_FORMATS if not lost_layers(modules, candidate)[loader]]
        verdicts = [
            f"{verb} {len(names)} of this LoRA's {len(modules)} layers, such as {names[0]}"
            for loss, verb in (("dropped", "leaves out"), ("wrong", "misapplies"))
            if (names := [name for name, layer_loss in layer_losses.items() if layer_loss == loss])
        ]
        verdict = (
            " and ".join(verdicts)
            if loader in LORA_FORMATS[lora_format].readers
            else "reads none of this LoRA's layers"
        )
        texts[loader] = (
            f"In the {lora_format} format, {loader} {verdict}. "
            f"It reads all layers in the {join_names(lossless_formats)} format."
        )
    return texts


def lora_modules(file: AdapterFile) -> dict[str, LowRank]:
    """The layers of a LoRA file by diffusers' names. Parts of fused matrices have their original ranks.

    Raises:
        CheckpointError: the file holds no LoRA, or another kind of adapter.
    """
    if not file.modules:
        check_all_read(file)
    modules = {}
    other_kinds = []
    for name, factors in unfused(file.modules, file.header).items():
        if isinstance(factors, LowRank):
            modules[name] = factors
        else:
            other_kinds.append(name)
    if other_kinds or not modules:
        kind = "LoKr or LoHa" if other_kinds else "no LoRA"
        raise CheckpointError.of(
            f"{file.path} holds {kind}"
            + (f" factors for {len(other_kinds)} layers, such as {other_kinds[0]}" if other_kinds else ""),
            "a LoRA: two matrices for each layer",
        )
    return modules


def folded(factors: LowRank) -> LowRank:
    """The same ΔW with a scale of 1: b is multiplied by the scale, in fp32 if its own dtype would round the product."""
    if factors.scale == 1:
        return factors
    exact = factors.b.double() * factors.scale
    in_own_dtype = exact.to(factors.b.dtype)
    scaled_b = in_own_dtype if in_own_dtype.itemsize > 4 or torch.equal(in_own_dtype.double(), exact) else exact.float()
    return LowRank(factors.a, scaled_b)


def lora_tensors(modules: Mapping[str, LowRank], lora_format: LoraFormat) -> dict[str, Tensor]:
    """The tensors of a file in `lora_format` with the LoRA on `modules` (diffusers' names).

    Raises:
        ValueError: FLUX.2 has no such module.
    """
    if unknown := [name for name in modules if to_bfl(name) is None]:
        raise ValueError(f"FLUX.2 has no Linear {unknown[0]}")
    layout = LORA_FORMATS[lora_format]
    modules = {name: folded(factors) for name, factors in modules.items()}
    named = _in_bfl(modules) if layout.is_bfl else modules
    tensors: dict[str, Tensor] = {}
    for name, factors in named.items():
        values = (factors.a, factors.b, torch.tensor(float(factors.rank)))
        tensors |= dict(zip(layout.keys(name), values, strict=False))
    return tensors


def _in_bfl(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """`modules` in BFL's layout: query, key and value fused, the halves of the last modulation swapped."""
    by_bfl_name = {
        name: fused([None if part is None else modules[part] for part in parts])
        for name, parts in fused_groups(modules).items()
    }
    for name, factors in modules.items():
        bfl_module = to_bfl(name)
        assert bfl_module is not None
        if bfl_module.parts == 1:
            halves = factors.b.chunk(2)
            by_bfl_name[bfl_module.name] = (
                LowRank(factors.a, torch.cat(halves[::-1])) if bfl_module.swaps_halves else factors
            )
    return by_bfl_name


def peft_metadata(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's configuration of a LoRA with these ranks by layer, as diffusers reads it from `ADAPTER_METADATA`.

    alpha equals the rank, because the scale is folded into B.
    """
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    other_ranks = {name: layer_rank for name, layer_rank in ranks.items() if layer_rank != rank}
    return {
        "transformer.r": rank,
        "transformer.lora_alpha": rank,
        "transformer.rank_pattern": other_ranks,
        "transformer.alpha_pattern": other_ranks,
        "transformer.target_modules": list(ranks),
    }


def _is_metadata_of(text: str, ranks: Mapping[str, int]) -> bool:
    """Whether PEFT's configuration in `text` assigns each layer its rank in `ranks` and a scale of 1."""
    try:
        config = json.loads(text)
        for key, pattern in _BY_PATTERN:
            default, by_name = config[f"transformer.{key}"], config[f"transformer.{pattern}"]
            # A key that is not a layer name is a regular expression, which PEFT may apply to any layer.
            if by_name.keys() - ranks.keys() or any(by_name.get(name, default) != rank for name, rank in ranks.items()):
                return False
        return not config.get("transformer.use_rslora")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


_BY_PATTERN = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def header_in(lora_format: LoraFormat, modules: Mapping[str, LowRank], header: Mapping[str, str]) -> dict[str, str]:
    """The header for `modules` in `lora_format`, derived from their file's header in any format."""
    new_header = {"format": "pt", **header}
    ranks = {name: factors.rank for name, factors in modules.items()}
    texts = [new_header.pop(key, "") for key in (PRESERVED_METADATA, ADAPTER_METADATA)]
    matching_metadata = next((text for text in texts if _is_metadata_of(text, ranks)), None)
    new_header.pop(FUSED_RANKS, None)
    if lora_format == "diffusers":
        new_header[ADAPTER_METADATA] = matching_metadata or json.dumps(peft_metadata(ranks), sort_keys=True)
        return new_header
    if matching_metadata is not None:
        new_header[PRESERVED_METADATA] = matching_metadata
    if LORA_FORMATS[lora_format].is_bfl and (parts := fused_ranks(modules)):
        new_header[FUSED_RANKS] = json.dumps(parts, separators=(",", ":"))
    return new_header


def write_adapter(
    path: Path, modules: Mapping[str, LowRank], lora_format: LoraFormat, header: Mapping[str, str]
) -> None:
    """Write the LoRA on `modules` (diffusers' names) to `path` in `lora_format`.

    The file replaces `path` only if `read_adapter` returns every layer bit for bit from it, and no other key. `header`
    holds text fields of any format's header; fields that `lora_format` requires are added.

    Raises:
        DiskError: no space, or the file reads back differently.
        ValueError: there are no modules, or FLUX.2 does not have one of them.
    """
    tensors = lora_tensors(modules, lora_format)
    with file_errors_reported(path), locked_part(path) as part:
        save_verified(part, tensors, header_in(lora_format, modules, header))
        adapter_file = read_adapter(part)
        read_back = lora_modules(adapter_file)
        differ = [name for name, factors in modules.items() if not _is_same(read_back.get(name), folded(factors))]
        if differ or adapter_file.unread or read_back.keys() != modules.keys():
            count = len(differ) + len(adapter_file.unread) + len(read_back.keys() - modules.keys())
            raise DiskError.of(
                f"{path} reads back differently from what was written ({count} layers)",
                remedy="Check the disk, then save again.",
            )
        part.replace(path)


def _is_same(read_back: LowRank | None, expected: LowRank) -> bool:
    """Whether the factors have equal values. The dtype may differ: fusing can widen it."""
    return read_back is not None and all(
        torch.equal(read_factor.double(), expected_factor.double())
        for read_factor, expected_factor in ((read_back.a, expected.a), (folded(read_back).b, expected.b))
    )
