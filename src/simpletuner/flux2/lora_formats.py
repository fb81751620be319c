"""LoRA files as each program wants them: diffusers', ComfyUI's, BFL's and kohya's names, and what each loader loses.

A conversion is exact: the same effect, and our own file comes back bit for bit. Query, key and value are fused as
`flux2.fused` has it, the halves of the last modulation change places, and alpha/rank is folded into B, since loaders
disagree about where alpha is kept.
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

KEPT_METADATA = f"simpletuner.{ADAPTER_METADATA}"
"""Header field of `ADAPTER_METADATA` in a file of another format, in which diffusers must not find it: its names and
ranks are those of diffusers' format."""

Loss = Literal["dropped", "wrong"]
"""What a loader does with a layer: "dropped" leaves it out, "wrong" applies something else."""


@dataclass(frozen=True)
class LoraLayout:
    """How the keys of a format are spelled."""

    prefix: str
    is_bfl: bool
    """Whether modules have BFL's names, and its fused matrices, or diffusers'."""
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    is_flat: bool = False
    """Whether the dots in a module's name are underscores, as kohya's scripts have it."""
    has_alpha: bool = False
    """Whether a key beside the factors holds alpha; it is the rank."""
    readers: tuple[AdapterLoader, ...] = ADAPTER_LOADERS
    """The loaders that read the format at all."""

    def keys(self, stem: str) -> tuple[str, ...]:
        """Of the factors a and b of a module, and of its alpha if there is a key for it."""
        key = self.prefix + (stem.replace(".", "_") if self.is_flat else stem)
        return (key + self.down, key + self.up, *([f"{key}.alpha"] if self.has_alpha else ()))


LORA_FORMATS: Mapping[LoraFormat, LoraLayout] = {
    "diffusers": LoraLayout("transformer.", is_bfl=False),
    "comfyui": LoraLayout("diffusion_model.", is_bfl=True),
    "bfl": LoraLayout("base_model.model.", is_bfl=True, readers=("diffusers",)),
    "kohya": LoraLayout("lora_unet_", True, ".lora_down.weight", ".lora_up.weight", is_flat=True, has_alpha=True),
}


def losses(modules: Iterable[str], lora_format: LoraFormat) -> dict[AdapterLoader, dict[str, Loss]]:
    """What each loader loses of a LoRA on `modules` (diffusers' names) in a file of `lora_format`; {} if nothing."""
    names = list(modules)
    layout = LORA_FORMATS[lora_format]
    stems = [place.name if layout.is_bfl and (place := to_bfl(name)) else name for name in names]
    verdicts = loader_verdicts([key for stem in stems for key in layout.keys(stem)], names)
    lost: dict[AdapterLoader, dict[str, Loss]] = {}
    for loader, verdict in verdicts.items():
        dropped = names if verdict.refusal else verdict.dropped
        lost[loader] = dict.fromkeys(dropped, "dropped")
        lost[loader] |= dict.fromkeys(verdict.wrong, "wrong")
    return lost


def loss_texts(modules: Collection[str], lora_format: LoraFormat) -> dict[AdapterLoader, str]:
    """For each loader that loses something of a LoRA on `modules` in `lora_format`: what, and which formats it reads
    whole.
    """
    texts = {}
    for loader, lost in losses(modules, lora_format).items():
        if not lost:
            continue
        whole = [other for other in LORA_FORMATS if not losses(modules, other)[loader]]
        doing = [
            f"{verb} {len(names)} of {len(modules)} layers, such as {names[0]}"
            for loss, verb in (("dropped", "leaves out"), ("wrong", "gets wrong"))
            if (names := [name for name, own in lost.items() if own == loss])
        ]
        found = " and ".join(doing) if loader in LORA_FORMATS[lora_format].readers else "reads none of it"
        texts[loader] = (
            f"Of this LoRA in the {lora_format} format, {loader} {found}. It reads all of it in {join_names(whole)}."
        )
    return texts


def lora_modules(file: AdapterFile) -> dict[str, LowRank]:
    """The layers of a LoRA file by diffusers' names, at the ranks that they had before they were fused.

    Raises:
        CheckpointError: it holds another kind of adapter.
    """
    if not file.modules:
        check_all_read(file)
    modules = {}
    others = []
    for name, factors in unfused(file.modules, file.header).items():
        if isinstance(factors, LowRank):
            modules[name] = factors
        else:
            others.append(name)
    if others or not modules:
        kind = "LoKr or LoHa" if others else "no LoRA"
        raise CheckpointError.of(
            f"{file.path} holds {kind}" + (f" factors for {len(others)} layers, such as {others[0]}" if others else ""),
            "a LoRA, two matrices for each layer",
        )
    return modules


def folded(factors: LowRank) -> LowRank:
    """The same ΔW with a scale of 1: b times the scale, in fp32 where b's own dtype would round it."""
    if factors.scale == 1:
        return factors
    exact = factors.b.double() * factors.scale
    own = exact.to(factors.b.dtype)
    wide = own if own.itemsize > 4 or torch.equal(own.double(), exact) else exact.float()
    return LowRank(factors.a, wide)


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
    """`modules` by BFL's names, fused and with its order of halves."""
    found = {
        name: fused([None if part is None else modules[part] for part in parts])
        for name, parts in fused_groups(modules).items()
    }
    for name, factors in modules.items():
        place = to_bfl(name)
        assert place is not None
        if place.parts == 1:
            halves = factors.b.chunk(2)
            found[place.name] = LowRank(factors.a, torch.cat(halves[::-1])) if place.swaps_halves else factors
    return found


def peft_metadata(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's configuration of a LoRA whose layers have these ranks, as diffusers reads it from `ADAPTER_METADATA`.
    alpha = rank, since the scale is in B.
    """
    ((rank, _),) = Counter(ranks.values()).most_common(1)
    others = {name: own for name, own in ranks.items() if own != rank}
    return {
        "transformer.r": rank,
        "transformer.lora_alpha": rank,
        "transformer.rank_pattern": others,
        "transformer.alpha_pattern": others,
        "transformer.target_modules": list(ranks),
    }


def _is_metadata_of(text: str, ranks: Mapping[str, int]) -> bool:
    """Whether PEFT's configuration in `text` gives each layer its rank in `ranks` and a scale of 1."""
    try:
        config = json.loads(text)
        for key, pattern in _BY_PATTERN:
            default, by_name = config[f"transformer.{key}"], config[f"transformer.{pattern}"]
            # A key that names no layer is a regular expression, which PEFT may apply to any of them.
            if by_name.keys() - ranks.keys() or any(by_name.get(name, default) != rank for name, rank in ranks.items()):
                return False
        return not config.get("transformer.use_rslora")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


_BY_PATTERN = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))


def header_in(lora_format: LoraFormat, modules: Mapping[str, LowRank], header: Mapping[str, str]) -> dict[str, str]:
    """The header of a file in `lora_format` that holds `modules`, from that of their file in any format."""
    found = {"format": "pt", **header}
    ranks = {name: factors.rank for name, factors in modules.items()}
    texts = [found.pop(key, "") for key in (KEPT_METADATA, ADAPTER_METADATA)]
    of_these = next((text for text in texts if _is_metadata_of(text, ranks)), None)
    found.pop(FUSED_RANKS, None)
    if lora_format == "diffusers":
        found[ADAPTER_METADATA] = of_these or json.dumps(peft_metadata(ranks), sort_keys=True)
        return found
    if of_these is not None:
        found[KEPT_METADATA] = of_these
    if LORA_FORMATS[lora_format].is_bfl and (parts := fused_ranks(modules)):
        found[FUSED_RANKS] = json.dumps(parts, separators=(",", ":"))
    return found


def write_adapter(
    path: Path, modules: Mapping[str, LowRank], lora_format: LoraFormat, header: Mapping[str, str]
) -> None:
    """Write the LoRA on `modules` (diffusers' names) to `path` in `lora_format`, and read it back as any file is read:
    every layer must be there with the same bits, and no key be left over. Until then, `path` is as it was.

    `header` holds text fields of any format's header; what this one needs is added.

    Raises:
        DiskError: no space, or the file reads back differently.
        ValueError: no modules, or one that FLUX.2 does not have.
    """
    tensors = lora_tensors(modules, lora_format)
    with file_errors_reported(path), locked_part(path) as part:
        save_verified(part, tensors, header_in(lora_format, modules, header))
        read = read_adapter(part)
        found = lora_modules(read)
        differ = [name for name, factors in modules.items() if not _is_same(found.get(name), folded(factors))]
        if differ or read.unread or found.keys() != modules.keys():
            count = len(differ) + len(read.unread) + len(found.keys() - modules.keys())
            raise DiskError.of(
                f"{path} reads back differently from what was written ({count} layers)",
                remedy="Check the disk, then save again.",
            )
        part.replace(path)


def _is_same(found: LowRank | None, expected: LowRank) -> bool:
    """Whether the factors are equal to the bit; fusing may have widened a dtype."""
    return found is not None and all(
        torch.equal(one.double(), other.double())
        for one, other in ((found.a, expected.a), (folded(found).b, expected.b))
    )
