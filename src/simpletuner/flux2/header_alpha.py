"""Compute a LoRA layer's scale from the file's header, by the rules of PEFT and diffusers."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.base.errors import CheckpointError

ADAPTER_METADATA = "lora_adapter_metadata"
"""Header field with PEFT's configuration, which diffusers reads. Its names and ranks are those of diffusers' format."""
SAVE_AGAIN = "The file is damaged: use another copy, or save it again with the program that wrote it."

_PLAIN_ENDING = re.compile(r"\^?[\w.-]+")
"""The supported alpha patterns. PEFT allows regular expressions, but matching untrusted ones may never terminate."""
_ALPHA_LIMIT = 1e9
_RANK_LIMIT = 1_000_000


def checked_alpha(path: Path, key: str, value: object, location: str = " in its header") -> float:
    """`value` as an alpha; `location` says where in `path` it is stored.

    Raises:
        CheckpointError: `value` is not a valid alpha.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _ALPHA_LIMIT:
        return float(value)
    raise CheckpointError.of(
        f"{path}: {key} = {str(value)[:60]}{location}",
        f"a number above 0, up to {_ALPHA_LIMIT:g}",
        _alpha_remedy(value),
    )


def _alpha_remedy(value: object) -> str:
    """What to do about an invalid alpha."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_ALPHA_LIMIT <= value <= 0:
        return SAVE_AGAIN
    if value == 0:
        return (
            "With an alpha of 0 a LoRA has no effect: save it again with another alpha, such as its rank. Set its "
            "strength where you use it, as in `simpletuner sample --lora FILE:0.5`."
        )
    return (
        f"A negative alpha subtracts a LoRA: save it again with an alpha of {-value:g}, and subtract it where you use "
        "it, as in `simpletuner sample --lora FILE:-1`."
    )


class HeaderScale:
    """Computes a layer's scale by PEFT's rules: alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732).

    Without PEFT's metadata alpha is the rank, as in diffusers.

    Raises:
        CheckpointError: the metadata is damaged, or has an invalid alpha or rank or an unsupported alpha pattern.
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        metadata = _json_object(path, header.get(ADAPTER_METADATA, "{}"))
        settings = {key.removeprefix("transformer."): value for key, value in metadata.items()}
        self.is_dora = bool(settings.get("use_dora"))
        """Whether the header declares a DoRA."""
        self.is_rank_stabilized = bool(settings.get("use_rslora"))
        default = settings.get("lora_alpha")
        self.default = None if default is None else checked_alpha(path, "lora_alpha", default)
        ranks = {"r": settings["r"]} if "r" in settings else {}
        for key, rank in (ranks | _patterns(path, "rank_pattern", settings)).items():
            if type(rank) is not int or not 0 < rank <= _RANK_LIMIT:
                raise CheckpointError.of(
                    f"{path}: the rank of {key} is {str(rank)[:60]} in its header",
                    f"a whole number from 1 to {_RANK_LIMIT:,}",
                    SAVE_AGAIN,
                )
        self.by_ending: dict[str, tuple[int, float]] = {}
        """Index in the header and alpha of each pattern. Patterns that begin with ^ are whole names, others endings."""
        for index, (pattern, alpha) in enumerate(_patterns(path, "alpha_pattern", settings).items()):
            ending = pattern.removesuffix("$").replace(r"\.", ".")
            if not _PLAIN_ENDING.fullmatch(ending):
                raise CheckpointError.of(
                    f"{path}: alpha_pattern has the regular expression {pattern[:60]} in its header",
                    "names of layers, or their endings after a dot",
                    "List the full names of the layers, as PEFT does when it saves.",
                )
            checked = checked_alpha(path, f"alpha_pattern {pattern[:60]}", alpha)
            self.by_ending.setdefault(ending, (index, checked))

    def __call__(self, layer: str, rank: int) -> float:
        """The scale of `layer` (diffusers' name), whose factors have `rank`."""
        parts = layer.split(".")
        endings = [f"^{layer}", *(".".join(parts[start:]) for start in range(len(parts)))]
        matches = [self.by_ending[ending] for ending in endings if ending in self.by_ending]
        alpha = min(matches)[1] if matches else self.default  # PEFT uses the first match in the header
        if alpha is None:
            return 1.0
        return float(alpha / (rank**0.5 if self.is_rank_stabilized else rank))


def _json_object(path: Path, text: str) -> dict[str, Any]:
    """Parse the adapter's metadata in the header."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError.of(f"{path}: {ADAPTER_METADATA} = {text[:60]} in its header", "a JSON object", SAVE_AGAIN)
    return value


def _patterns(path: Path, key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `key` by pattern; empty if the key is missing or null."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError.of(
            f"{path}: {key} = {str(value)[:60]} in its header", "an object that maps layers to values", SAVE_AGAIN
        )
    return value or {}
