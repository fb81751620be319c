"""The adapter: its rank, where it attaches, how it starts and how it is saved."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Count, IsJson, PathText, Positive, Says, Slice, list_as_tuple

_PATTERN = re.compile(r"[\\^$*+?{}()|\[\]]")
"""A character that no module's name has, and a regular expression mostly does."""
_CUT_LIST = re.compile(r"\[.*,.*\]")
"""A list with names that are not quoted."""


def _listed(value: object) -> object:
    """Names with commas between as a list, of one where there is none; a regular expression as it is."""
    if isinstance(value, str) and not _PATTERN.search(value):
        return tuple(part.strip() for part in value.split(","))
    return list_as_tuple(value)


def _targets(value: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if not value or not all(value):
        raise ValueError("empty")
    if isinstance(value, str):
        if _CUT_LIST.fullmatch(value):
            raise ValueError("a list that is no JSON")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
    return value


LoraFormat = Literal["diffusers", "comfyui", "bfl", "kohya"]
"""Whose names a LoRA file has; `flux2.lora_formats` says what they are."""


class LoraOptions(Slice):
    """LoRA."""

    lora_rank: Count = 16
    """Rank of each adapter: its width, and so its size and freedom."""

    lora_alpha: Positive | None = None
    """Strength of the adapter: its output is scaled by alpha/rank. By default the rank, a scale of 1."""

    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Chance that an input of the adapter is dropped in training."""

    lora_init_type: Literal["default", "gaussian"] = "default"
    """How A starts: `default` is uniform by its width, `gaussian` has a standard deviation of 1/rank.
    B starts at zero in both, so training starts from the base model exactly."""

    lora_plus_ratio: Positive = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354); 1 gives both the same."""

    lora_save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the saved file. Training always keeps fp32."""

    lora_type: Literal["standard"] = "standard"
    """The kind of adapter."""

    flux_lora_target: Literal["all", "attention", "mlp", "tiny"] = "all"
    """Which layers learn: `all` is every Linear of every block; `attention` the q, k, v and output
    projections; `mlp` the feed-forward; `tiny` q, k, v only. In single blocks, which fuse these, only the
    rows or columns that belong to the choice are trained."""

    peft_lora_target_modules: (
        Annotated[
            tuple[str, ...] | str,
            IsJson(),
            BeforeValidator(_listed),
            AfterValidator(_targets),
            Says('a list of module names, as to_q,to_k or ["to_q", "to_k"], or a regular expression'),
        ]
        | None
    ) = None
    """Replaces `flux_lora_target`: a list of module names (`to_q,to_k` or `["to_q", "to_k"]`; each matches a module of
    that name or one whose path ends in it), or one regular expression that a module's whole path must match. One that
    matches nothing is an error."""

    init_lora: PathText | None = None
    """Start from this saved LoRA, of this or another program. Ranks and alpha then come from the file."""

    lora_format: LoraFormat = "diffusers"
    """Names inside the exported file: `diffusers` is read by diffusers and ComfyUI, but not the layers outside the
    blocks in ComfyUI; `comfyui` and `kohya` have BFL's names, which both read too, ComfyUI with every layer; `bfl` is
    PEFT's spelling of BFL's names, for programs that train on that model. Checkpoints have diffusers' names always."""

    @property
    def alpha(self) -> float:
        """`lora_alpha`, or the rank where it is not given."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
