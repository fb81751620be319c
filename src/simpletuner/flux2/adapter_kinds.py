"""Adapter kinds beside LoRA by the suffixes of their keys: LoKr and LoHa are read, DoRA, OFT and patches only named."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from simpletuner.flux2.factors import Factors, Hadamard, Kronecker

LOKR_SUFFIXES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA_SUFFIXES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
FACTOR_SUFFIXES = frozenset(LOKR_SUFFIXES + LOHA_SUFFIXES)
"""What follows a module's name and a dot in the keys that `factors_of` reads."""


@dataclass(frozen=True)
class UnreadKind:
    """An adapter kind that is recognized and not read."""

    name: str
    """As `AdapterFile.unread` has it: "dora", "oft" or "diff"."""
    title: str
    """For messages."""
    readers: str
    """The programs that apply it."""


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
"""Kinds by what follows a module's name and a dot in their keys."""


def factors_of(tensors: Mapping[str, Tensor], alpha: float | None) -> Factors | None:
    """The factors of one module of a LoKr or LoHa file; None where no tensor is of these kinds.

    scale is alpha / rank, 1 without an alpha. Of a LoKr the rank is that of the decomposed factor, w2's if both are;
    where both are full, alpha is ignored (ai-toolkit writes 9999999999, infinite in fp16). LyCORIS' rules, which
    ComfyUI and diffusers share; only LyCORIS' `get_merged_weight` applies alpha / rank twice.

    Args:
        tensors: by suffix, those of `FACTOR_SUFFIXES`; others are not looked at.
        alpha: of the module, as a number.

    Raises:
        ValueError: factors that are missing or do not fit together, or an alpha that is no number above 0. The text
            says what, and not in which module.
    """
    suffixes = FACTOR_SUFFIXES & tensors.keys()
    if not suffixes:
        return None
    if suffixes & set(LOKR_SUFFIXES) and suffixes & set(LOHA_SUFFIXES):
        raise ValueError("factors of a LoKr and of a LoHa for one module")
    for suffix in sorted(suffixes):
        if suffix in ("lokr_t2", "hada_t1", "hada_t2"):
            raise ValueError(f"{suffix}, the core of a convolution, where FLUX.2 has Linears only")
        if tensors[suffix].ndim != 2 or not tensors[suffix].numel():
            raise ValueError(f"{suffix} of the shape {list(tensors[suffix].shape)}, which is no matrix")
        if not tensors[suffix].is_floating_point():
            raise ValueError(f"{suffix} as {tensors[suffix].dtype}, which is no floating-point type")
    if suffixes & set(LOHA_SUFFIXES):
        return _hadamard(tensors, alpha)
    w1, rank1 = _whole_or_product(tensors, "lokr_w1")
    w2, rank2 = _whole_or_product(tensors, "lokr_w2")
    rank = rank2 or rank1
    return Kronecker(w1, w2, 1.0 if rank is None else _scale(alpha, rank), rank=rank)


def _hadamard(tensors: Mapping[str, Tensor], alpha: float | None) -> Hadamard:
    missing = [suffix for suffix in LOHA_SUFFIXES[:4] if suffix not in tensors]
    if missing:
        raise ValueError(f"no {missing[0]}, which a LoHa has")
    w1_b, w1_a, w2_b, w2_a = (tensors[suffix] for suffix in LOHA_SUFFIXES[:4])
    _check_product(w1_b, w1_a, "hada_w1")
    _check_product(w2_b, w2_a, "hada_w2")
    if (w1_b.shape[0], w1_a.shape[1]) != (w2_b.shape[0], w2_a.shape[1]):
        raise ValueError("hada_w1 and hada_w2 of different shapes")
    return Hadamard(w1_a, w1_b, w2_a, w2_b, _scale(alpha, w1_a.shape[0]))


def _whole_or_product(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, int | None]:
    """A factor of a LoKr and the rank that it is decomposed at; a product is in fp32."""
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
        raise ValueError(f"{name}_a of rank {b.shape[1]} beside {name}_b of rank {a.shape[0]}")


def _scale(alpha: float | None, rank: int) -> float:
    if alpha is None:
        return 1.0
    if not 0 < alpha < float("inf"):
        raise ValueError(f"an alpha of {alpha:g}")
    return alpha / rank
