"""Options for the adapter: its rank, target modules, initialization and file format."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Count, Expects, IsJson, PathText, Positive, Slice, list_as_tuple

_PATTERN = re.compile(r"[\\^$*+?{}()|\[\]]")
"""Characters of regular expressions that no module name contains."""
_UNQUOTED_LIST = re.compile(r"\[.*,.*\]")
"""A list whose names are not quoted, so that it is not JSON."""


def _listed(value: object) -> object:
    """Split a comma list of module names into a tuple; return a regular expression unchanged."""
    if isinstance(value, str) and not _PATTERN.search(value):
        return tuple(part.strip() for part in value.split(","))
    return list_as_tuple(value)


def _targets(value: tuple[str, ...] | str) -> tuple[str, ...] | str:
    if not value or not all(value):
        raise ValueError("empty")
    if isinstance(value, str):
        if _UNQUOTED_LIST.fullmatch(value):
            raise ValueError("a list that is not JSON")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
    return value


LoraFormat = Literal["diffusers", "comfyui", "bfl", "kohya"]
"""Naming scheme of the tensors in a LoRA file; `flux2.lora_formats` defines each."""


class LoraOptions(Slice):
    """LoRA."""

    lora_rank: Count = 16
    """Rank of each adapter. A higher rank can learn more but makes a larger file."""

    lora_alpha: Positive | None = None
    """Strength of the adapter: its output is multiplied by alpha/rank. By default alpha is the rank, a factor of 1."""

    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Probability of dropping each input value of the adapter in training (dropout)."""

    lora_init_type: Literal["default", "gaussian"] = "default"
    """Initialization of the adapter's A matrix: `default` is uniform in ±1/√n for n inputs (Kaiming); `gaussian` is
    normal with a standard deviation of 1/rank. B always starts at zero, so training starts exactly from the base
    model."""

    lora_plus_ratio: Positive = 1.0
    """Ratio of the learning rate of B to that of A (LoRA+, arXiv 2402.12354). At 1 both have the same."""

    lora_save_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the saved LoRA file. In training the adapter is always fp32."""

    lora_type: Literal["standard"] = "standard"
    """The kind of adapter."""

    flux_lora_target: Literal["all", "attention", "mlp", "tiny"] = "all"
    """Which layers get an adapter: `all`, every Linear of every block; `attention`, the q, k, v and output projections;
    `mlp`, the feed-forward layers; `tiny`, only q, k and v. Single blocks fuse these layers; there only the rows or
    columns of the chosen layers are trained."""

    peft_lora_target_modules: (
        Annotated[
            tuple[str, ...] | str,
            IsJson(),
            BeforeValidator(_listed),
            AfterValidator(_targets),
            Expects('a list of module names, such as to_q,to_k or ["to_q", "to_k"], or a regular expression'),
        ]
        | None
    ) = None
    """Target modules by name, instead of `flux_lora_target`: a list of names (`to_q,to_k` or `["to_q", "to_k"]`; each
    matches the modules whose path is the name or ends with it), or one regular expression that must match a module's
    whole path. A name or expression that matches no module is an error."""

    init_lora: PathText | None = None
    """Start from this saved LoRA file, made by this or another program. Ranks and alphas then come from the file."""

    lora_format: LoraFormat = "diffusers"
    """Tensor names in the exported LoRA file. diffusers and ComfyUI both read `diffusers`, but ComfyUI skips its layers
    outside the blocks. `comfyui` and `kohya` use BFL's names, which both programs read, ComfyUI with every layer. `bfl`
    is PEFT's spelling of BFL's names, for programs that train BFL's own model code. Checkpoints always use diffusers'
    names."""

    @property
    def alpha(self) -> float:
        """`lora_alpha`; the rank where it is not set."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha
