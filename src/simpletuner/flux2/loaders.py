"""Predict how diffusers 0.42 and ComfyUI 0.19 load an adapter file, from its keys."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from simpletuner.flux2.dialects import prefix_of
from simpletuner.flux2.names import to_bfl

AdapterLoader = Literal["diffusers", "ComfyUI"]
ADAPTER_LOADERS: tuple[AdapterLoader, ...] = ("diffusers", "ComfyUI")

_BFL = re.compile(r"(double|single)_blocks|(img|txt|time|guidance)_in(\b|_)|final_layer|\w+_modulation\w*[._]lin\b")
_HUNYUAN = re.compile(r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\b")
_PEFT = (".lora_A.weight", ".lora_B.weight")
_OLD_DIFFUSERS = (".lora.down.weight", ".lora.up.weight")
_KOHYA = (".lora_down.weight", ".lora_up.weight")
_LINEAR_LAYER = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
_COMFYUI_SUFFIXES = (
    ".lora_up.weight",
    "_lora.up.weight",
    ".lora_B.weight",
    ".lora.up.weight",
    ".lora_B",
    ".lora_linear_layer.up.weight",
    ".lora_B.default.weight",
    ".lokr_w1",
    ".lokr_w1_b",
    ".hada_w1_b",
)
"""Key suffixes by which ComfyUI recognizes an adapter: one tensor for each kind of adapter and spelling."""

_OUTER_MODULATIONS = (
    "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear",
    "single_stream_modulation.linear",
)
_GUIDANCE = "time_guidance_embed.guidance_embedder."
_LAST = "norm_out.linear"


@dataclass(frozen=True)
class LoaderVerdict:
    """How a loader handles a file."""

    refusal: str = ""
    """Why it loads nothing; empty if it loads the file."""
    unknown: str = ""
    """Why its behavior cannot be predicted; empty if the other fields describe it."""
    dropped: tuple[str, ...] = ()
    """Linears, by diffusers' names, that it skips, silently or with a line in its log."""
    wrong: tuple[str, ...] = ()
    """Linears to which it applies a delta other than the trained one."""


@dataclass(frozen=True)
class _KeyStyle:
    """How the keys of a file are spelled."""

    prefix: str
    is_bfl: bool
    sides: str
    """Spelling of the two matrices' suffixes: "peft", "old", "kohya", "linear_layer", "lokr", "loha" or "other"."""
    has_alpha: bool
    is_hunyuan: bool


def loader_verdicts(
    keys: Iterable[str],
    modules: Iterable[str],
    *,
    unread: Mapping[str, str] = MappingProxyType({}),
    header_scaled: Collection[str] = (),
) -> dict[AdapterLoader, LoaderVerdict]:
    """The verdict of each loader on a file.

    Args:
        keys: the file's keys, all of one adapter.
        modules: the Linears that the adapter changes, in diffusers' names.
        unread: the file's other keys and their kinds, as in `AdapterFile.unread`.
        header_scaled: those of `modules` whose scale is only in the header, as in `AdapterFile.header_scaled`.
    """
    keys, modules = list(keys), list(modules)
    return {"diffusers": _diffusers(keys, modules, unread), "ComfyUI": _comfyui(keys, modules, header_scaled)}


def _style(keys: list[str]) -> _KeyStyle | None:
    """The spelling of `keys`; None if they mix several spellings."""
    spellings = set()
    is_bfl = False
    for key in keys:
        prefix = prefix_of(key)
        is_bfl |= _BFL.match(key.removeprefix(prefix)) is not None
        if not key.endswith(".alpha"):
            spellings.add((prefix, _sides(key)))
    if len(spellings) != 1:
        return None
    ((prefix, sides),) = spellings
    has_alpha = any(key.endswith(".alpha") for key in keys)
    return _KeyStyle(prefix, is_bfl, sides, has_alpha, any(map(_HUNYUAN.search, keys)))


def _sides(key: str) -> str:
    """The spelling of a key's matrix suffix, as in `_KeyStyle.sides`."""
    spellings = {"peft": _PEFT, "old": _OLD_DIFFUSERS, "kohya": _KOHYA, "linear_layer": _LINEAR_LAYER}
    for name, endings in spellings.items():
        if key.endswith(endings):
            return name
    leaf = key.rpartition(".")[2]
    return "lokr" if leaf.startswith("lokr_") else "loha" if leaf.startswith("hada_") else "other"


def _comfyui(keys: Iterable[str], modules: list[str], header_scaled: Collection[str]) -> LoaderVerdict:
    """The verdict of ComfyUI. It looks for keys with known names, and ignores the header."""
    keys = set(keys)
    dropped = tuple(
        name
        for name in modules
        if keys.isdisjoint(module + suffix for module in _comfyui_names(name) for suffix in _COMFYUI_SUFFIXES)
    )
    if len(dropped) == len(modules):
        return LoaderVerdict("it recognizes none of the file's names")
    wrong = tuple(name for name in modules if name in header_scaled and name not in dropped)
    return LoaderVerdict(dropped=dropped, wrong=wrong)


def _comfyui_names(module: str) -> Iterator[str]:
    """All names under which ComfyUI looks for the Linear `module`, which is one of diffusers' names."""
    bfl = to_bfl(module)
    if bfl is not None:
        yield f"diffusion_model.{bfl.name}"
        yield f"lora_unet_{bfl.name.replace('.', '_')}"
    if not module.startswith("time_guidance_embed.") and module not in _OUTER_MODULATIONS:
        flat = module.replace(".", "_")
        yield from (f"transformer.{module}", module, f"lora_transformer_{flat}", f"lycoris_{flat}")


def _diffusers(keys: list[str], modules: list[str], unread: Mapping[str, str]) -> LoaderVerdict:
    """The verdict of diffusers. It converts a whole file at once; the prefixes of some keys select the conversion."""
    style = _style(keys)
    if style is None:
        return LoaderVerdict(
            unknown="the prefixes of some keys decide how it reads a file, and this file mixes several layouts"
        )
    verdict = _diffusers_alone(style, modules)
    refused = None if verdict.refusal or verdict.unknown else _refused_key(style, unread)
    return verdict if refused is None else LoaderVerdict(f"it rejects files with a key such as {refused}")


def _refused_key(style: _KeyStyle, unread: Mapping[str, str]) -> str | None:
    """The first `unread` key that makes diffusers reject the whole file; None if there is none."""
    if style.sides == "kohya":  # It skips unknown keys.
        return None
    for key, kind in unread.items():
        if key.endswith(_KOHYA):  # It treats the whole file as kohya's.
            is_accepted = False
        elif style.prefix == "transformer.":
            is_accepted = any(word in key for word in ("lora", "lokr", "dora_scale"))
        else:  # It converts known names. It removes dora_scale first, so a DoRA loads as a LoRA.
            is_accepted = kind == "dora" and "magnitude" not in key
        if not is_accepted:
            return key
    return None


def _diffusers_alone(style: _KeyStyle, modules: list[str]) -> LoaderVerdict:
    """The verdict on a file that holds only the adapter."""
    no_layers = LoaderVerdict("it warns that the file has no layers for the model, and continues without the adapter")
    refused = LoaderVerdict("it rejects the file as an invalid adapter")
    if style.sides == "loha":
        return LoaderVerdict("it cannot read LoHa")
    if style.is_hunyuan:
        return refused
    outer = [name for name in modules if "transformer_blocks." not in name]
    if style.is_bfl:
        if style.prefix == "lora_unet_":
            if style.sides == "lokr":
                return refused
            names = (_GUIDANCE, *_OUTER_MODULATIONS, _LAST)
            return LoaderVerdict(dropped=tuple(name for name in outer if name.startswith(names)))
        if style.prefix in ("diffusion_model.", "base_model.model."):
            if style.sides not in ("peft", "lokr"):
                return no_layers if style.sides == "kohya" else refused
            if style.has_alpha and style.sides != "lokr":
                return LoaderVerdict("it rejects the file's alpha keys")
            return LoaderVerdict(wrong=(_LAST,) if _LAST in outer else ())
        return refused if style.has_alpha and style.prefix == "" else no_layers
    if style.prefix == "transformer." and style.sides in ("peft", "old", "lokr"):
        return LoaderVerdict("it rejects the file's alpha keys") if style.has_alpha else LoaderVerdict()
    if style.prefix == "transformer." and style.sides == "linear_layer":
        return refused
    if style.prefix == "transformer." and style.sides == "other":
        return LoaderVerdict(
            unknown="it reads keys with these suffixes only from files that its own old releases wrote"
        )
    if style.sides == "lokr":
        if style.prefix == "":
            return LoaderVerdict()
        return refused if outer or style.prefix != "lycoris_" else LoaderVerdict()
    if style.prefix in ("base_model.model.", "diffusion_model.") and style.sides == "peft":
        return refused if outer else LoaderVerdict()
    return no_layers
