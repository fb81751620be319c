"""The difference of two transformers, as a LoRA."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from simpletuner import __version__
from simpletuner.base.errors import CheckpointError, Problem
from simpletuner.flux2.lowrank import RankRule, Reduced, decomposed
from simpletuner.flux2.transformer_file import OpenTransformer
from simpletuner.memory.tensors import non_finite_count

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Differences:
    """The difference of two transformers' weights."""

    layers: Iterator[tuple[str, Reduced]]
    """Of each Linear that differs, computed as it is asked for."""
    others: dict[str, float]
    """Weights that differ and are no Linear's, such as norms, with their largest difference: no LoRA holds them. Filled
    as `layers` are."""
    dtype: torch.dtype
    """Of the tuned weights."""


def differences(
    base: OpenTransformer,
    tuned: OpenTransformer,
    rule: RankRule,
    device: torch.device,
    report: Callable[[Iterable[str]], Iterable[str]],
) -> Differences:
    """The difference `tuned` − `base`, cut to the rank of `rule`; one weight at a time is in memory, in fp32.

    Raises:
        CheckpointError: they are not two of one model; while it computes, also that a weight is NaN or infinite.
    """
    _check_same(base, tuned)
    others: dict[str, float] = {}

    def layers() -> Iterator[tuple[str, Reduced]]:
        for name in report(tuned.weights):
            first, second = base.weights[name].values(torch.float32), tuned.weights[name].values(torch.float32)
            for model, values in ((base, first), (tuned, second)):
                if count := non_finite_count(values):
                    raise CheckpointError.of(
                        f"{model.path}: {count:,} numbers of {name} are NaN or infinite", "finite weights"
                    )
            if torch.equal(first, second):
                continue
            difference = second - first
            if difference.ndim == 2:
                yield name.removesuffix(_WEIGHT), decomposed(difference.to(device), rule)
            else:
                others[name] = float(difference.abs().max())

    dtypes = {rows.weight.data.dtype for rows in tuned.weights.values()}
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    dtype = narrow.get(next(iter(dtypes)), torch.float32) if len(dtypes) == 1 else torch.float32
    return Differences(layers(), others, dtype)


def _check_same(base: OpenTransformer, tuned: OpenTransformer) -> None:
    shapes = [{name: rows.shape for name, rows in model.weights.items()} for model in (base, tuned)]
    odd = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if odd:
        first, second = (shape.get(odd[0]) for shape in shapes)
        texts = ["not there" if shape is None else " × ".join(map(str, shape)) for shape in (first, second)]
        raise CheckpointError(
            Problem(
                f"{len(odd)} weights of {tuned.path} have other shapes than in {base.path}, such as {odd[0]}, which is "
                f"{texts[1]}, and {texts[0]} in the base",
                "two models of one flavour",
            )
        )


def extracted_header(base: OpenTransformer, tuned: OpenTransformer, rule: RankRule) -> dict[str, str]:
    """The header of a LoRA that was taken from two models: which ones, by name, and what the tuned one says."""
    record = {"base": base.path.absolute().name, "tuned": tuned.path.absolute().name, **vars(rule)}
    header = {"simpletuner.version": __version__, "simpletuner.extracted": json.dumps(record)}
    return header | {
        key: text for key, text in tuned.header.items() if key in ("simpletuner.base_model", "simpletuner.licence")
    }
