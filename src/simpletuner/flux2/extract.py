"""Extract the difference of two transformers as a LoRA."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from simpletuner import __version__
from simpletuner.base.errors import CheckpointError, Problem
from simpletuner.flux2.lowrank import RankRule, ReducedDelta, decomposed
from simpletuner.flux2.transformer_file import OpenTransformer
from simpletuner.memory.tensors import non_finite_count

_WEIGHT = ".weight"


@dataclass(frozen=True)
class WeightDifferences:
    """The difference of two transformers' weights."""

    layers: Iterator[tuple[str, ReducedDelta]]
    """Factors of each Linear that differs, computed lazily."""
    other_differences: dict[str, float]
    """For each differing weight that is not a matrix, such as a norm, its largest absolute difference. A LoRA cannot
    hold it. Iterating over `layers` fills this."""
    dtype: torch.dtype
    """Dtype of the tuned weights if all are bf16 or all are fp16; else fp32."""


def differences(
    base: OpenTransformer,
    tuned: OpenTransformer,
    rule: RankRule,
    device: torch.device,
    report: Callable[[Iterable[str]], Iterable[str]],
) -> WeightDifferences:
    """The difference `tuned` − `base` at the rank of `rule`. One weight of each model at a time is in memory, in fp32.

    Raises:
        CheckpointError: the models differ in weights or shapes; while iterating, also if a weight has NaN or infinite
            values.
    """
    _check_same(base, tuned)
    others: dict[str, float] = {}

    def layers() -> Iterator[tuple[str, ReducedDelta]]:
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
    return WeightDifferences(layers(), others, dtype)


def _check_same(base: OpenTransformer, tuned: OpenTransformer) -> None:
    shapes = [{name: rows.shape for name, rows in model.weights.items()} for model in (base, tuned)]
    misfits = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if misfits:
        first, second = (shape.get(misfits[0]) for shape in shapes)
        texts = ["missing" if shape is None else " × ".join(map(str, shape)) for shape in (first, second)]
        raise CheckpointError(
            Problem(
                f"{len(misfits)} weights of {tuned.path} differ in shape from {base.path}, such as {misfits[0]}, "
                f"which is {texts[1]}, and {texts[0]} in the base",
                "two models of one flavour",
            )
        )


def extracted_header(base: OpenTransformer, tuned: OpenTransformer, rule: RankRule) -> dict[str, str]:
    """The header of an extracted LoRA: the names of both models, and fields of the tuned model's header."""
    record = {"base": base.path.absolute().name, "tuned": tuned.path.absolute().name, **vars(rule)}
    header = {"simpletuner.version": __version__, "simpletuner.extracted": json.dumps(record)}
    return header | {
        key: text for key, text in tuned.header.items() if key in ("simpletuner.base_model", "simpletuner.licence")
    }
