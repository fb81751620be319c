"""Identify adapter kinds other than LoRA by key suffixes.

LoKr and LoHa are read; DoRA, OFT and patches are only recognized.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from simpletuner.flux2.factors import Factors, Hadamard, Kronecker

LOKR_SUFFIXES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA_SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
FACTOR_SUFFIXES = frozenset(LOKR_SUFFIXES + LOHA_SUFFIXES)
"""Key suffixes, after a module's name and a dot, that `factors_of` reads."""


@dataclass(frozen=True)
class UnreadKind:
    """An adapter kind that is recognized but not supported."""

    name: str
    """Value in `AdapterFile.unread`: "dora", "oft" or "diff"."""
    title: str
    """Name in messages."""
    readers: str
    """The programs that support it."""


_DORA_ROWS = UnreadKind("dora", "DoRA (PEFT)", "diffusers and PEFT")
_DORA = UnreadKind("dora", "DoRA", "ComfyUI")
_DORA_AI_TOOLKIT = UnreadKind("dora", "DoRA (ai-toolkit)", "ai-toolkit")
_OFT_INPUT = UnreadKind("oft", "OFT (PEFT)", "PEFT and OneTrainer")
_OFT_OUTPUT = UnreadKind("oft", "OFT (LyCORIS)", "ComfyUI and LyCORIS")
_PATCH = UnreadKind("diff", "patches of whole tensors (.diff)", "ComfyUI")

UNREAD_SUFFIXES: Mapping[str, UnreadKind] = {
    "lora_magnitude_vector": _DORA_ROWS,
    "lora_magnitude_vector.weight": _DORA_ROWS,
    "lora_magnitude_vector.default": _DORA_ROWS,
    "lora_magnitude_vector.default.weight": _DORA_ROWS,
    "dora_scale": _DORA,
    "magnitude": _DORA_AI_TOOLKIT,
    "oft_R": _OFT_INPUT,
    "oft_R.weight": _OFT_INPUT,
    "oft_R.default.weight": _OFT_INPUT,
    "oft_R.scaled_oft": _OFT_INPUT,
    "oft_blocks": _OFT_OUTPUT,
    "oft_diag": _OFT_OUTPUT,
    "rescale": _OFT_OUTPUT,
    **dict.fromkeys(("diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight"), _PATCH),
}
"""Unsupported kinds by their key suffixes, after a module's name and a dot."""


def factors_of(tensors: Mapping[str, Tensor], alpha: float | None) -> Factors | None:
    """The factors of one module of a LoKr or LoHa file; None if no tensor is of these kinds.

    The scale is alpha / rank, or 1 without an alpha. A LoKr's rank is that of the decomposed factor, of w2 if both are
    decomposed. If both are full, alpha is ignored (ai-toolkit writes 9999999999, infinite in fp16). These are LyCORIS'
    rules, shared by ComfyUI and diffusers; only LyCORIS' `get_merged_weight` applies alpha / rank twice.

    Args:
        tensors: the module's tensors by suffix. Suffixes outside `FACTOR_SUFFIXES` are ignored.
        alpha: the module's alpha.

    Raises:
        ValueError: factors are missing or do not fit together, or alpha is not a number above 0. The message names the
            defect, but not the module.
    """
    suffixes = FACTOR_SUFFIXES & tensors.keys()
    if not suffixes:
        return None
    if suffixes & set(LOKR_SUFFIXES) and suffixes & set(LOHA_SUFFIXES):
        raise ValueError("factors of both a LoKr and a LoHa for one module")
    for suffix in sorted(suffixes):
        if suffix in ("lokr_t2", "hada_t1", "hada_t2"):
            raise ValueError(f"{suffix}, the core of a convolution, but FLUX.2 has Linears only")
        if tensors[suffix].ndim != 2 or not tensors[suffix].numel():
            raise ValueError(f"{suffix} of the shape {list(tensors[suffix].shape)}, which is not a matrix")
        if not tensors[suffix].is_floating_point():
            raise ValueError(f"{suffix} as {tensors[suffix].dtype}, which is not a floating-point dtype")
    if suffixes & set(LOHA_SUFFIXES):
        return _hadamard(tensors, alpha)
    w1, rank1 = _whole_or_product(tensors, "lokr_w1")
    w2, rank2 = _whole_or_product(tensors, "lokr_w2")
    rank = rank2 or rank1
    return Kronecker(w1, w2, 1.0 if rank is None else _scale(alpha, rank), rank=rank)


def _hadamard(tensors: Mapping[str, Tensor], alpha: float | None) -> Hadamard:
    missing = [suffix for suffix in LOHA_SUFFIXES[:4] if suffix not in tensors]
    if missing:
        raise ValueError(f"no {missing[0]}, which a LoHa requires")
    w1_b, w1_a, w2_b, w2_a = (tensors[suffix] for suffix in LOHA_SUFFIXES[:4])
    _check_product(w1_b, w1_a, "hada_w1")
    _check_product(w2_b, w2_a, "hada_w2")
    if (w1_b.shape[0], w1_a.shape[1]) != (w2_b.shape[0], w2_a.shape[1]):
        raise ValueError("hada_w1 and hada_w2 of different shapes")
    return Hadamard(w1_a, w1_b, w2_a, w2_b, _scale(alpha, w1_a.shape[0]))


def _whole_or_product(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, int | None]:
    """A factor of a LoKr, and its rank if the file decomposes it; the product is in fp32."""
    halves = [f"{name}_a", f"{name}_b"]
    if name in tensors:
        if any(half in tensors for half in halves):
            raise ValueError(f"{name} both whole and decomposed")
        return tensors[name], None
    if not all(half in tensors for half in halves):
        raise ValueError(f"no {name}, nor both of {halves[0]} and {halves[1]}")
    b, a = (tensors[half] for half in halves)
    _check_product(b, a, name)
    return b.float() @ a.float(), a.shape[0]


def _check_product(b: Tensor, a: Tensor, name: str) -> None:
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"{name}_a of rank {b.shape[1]}, but {name}_b of rank {a.shape[0]}")


def _scale(alpha: float | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    if not 0 < alpha < float("inf"):
        raise ValueError(f"an alpha of {alpha:g}")
    return alpha / rank
