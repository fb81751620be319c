"""The whole transformer as what is trained: every weight of it."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from simpletuner.flux2.learning import Learning
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.masters import Masters, SteppedParameters
from simpletuner.memory.precision import check_range
from simpletuner.memory.row_shards import RowShards
from simpletuner.memory.world import World


class WeightKind(TypedDict):
    """The weights that share a place in their blocks."""

    name: str
    tensors: int
    parameters: int


class WeightAudit(TypedDict):
    """What is trained, for people and for JSON. `weight_bytes` is what the model computes with, `master_bytes` what the
    optimizer steps on where that is something else.
    """

    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int
    master_bytes: int
    kinds: list[WeightKind]


class FullModel(Learning):
    """Every weight of a transformer, by diffusers' names: itself, its fp32 master where there is one, or this rank's
    rows of it where it is sharded.
    """

    foreign = "weights of another model"

    def __init__(self, transformer: Flux2Transformer, masters: SteppedParameters | None) -> None:
        self.transformer = transformer
        self.masters = masters

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.transformer.named_parameters())

    def disabled(self) -> None:
        """None: the base model is gone with the first step."""

    @contextlib.contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        if not isinstance(self.masters, Masters):
            with super().holding(state):
                yield
            return
        # The masters stay as they are: only the weights show others.
        self.masters.show(state)
        try:
            yield
        finally:
            self.masters.settle()

    def by_role(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """The matrices of the blocks; those around them (embedders, modulation, the last layers); the norms' scales."""
        inner: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        for (name, parameter), shape in zip(self.named_parameters(), self.whole_shapes, strict=True):
            is_inner = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
            (scales if len(shape) < 2 else inner if is_inner else outer).append(parameter)
        return inner, outer, scales

    def audit(self) -> WeightAudit:
        """What learns, counted from the weights themselves."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.weights.items():
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(parameter)
        masters = list(self.masters.parameters.values()) if isinstance(self.masters, Masters) else []
        return WeightAudit(
            dtype=str(next(iter(self.weights.values())).dtype).removeprefix("torch."),
            tensors=len(self.weights),
            parameters=self.parameter_count,
            weight_bytes=sum(weight.nbytes for weight in self.weights.values()),
            master_bytes=sum(master.nbytes for master in masters),
            kinds=[
                WeightKind(name=name, tensors=len(members), parameters=sum(member.numel() for member in members))
                for name, members in groups.items()
            ],
        )


def unfreeze(transformer: Flux2Transformer, masters: torch.dtype | None = None) -> FullModel:
    """Make every weight of `transformer` learn, its norms and embedders too.

    Args:
        masters: where given, the weights compute as this type, and the fp32 ones they were become their masters.
    """
    transformer.requires_grad_(True)
    kept = None if masters is None else Masters(dict(transformer.named_parameters()), masters)
    return FullModel(transformer, kept)


def unfreeze_sharded(transformer: Flux2Transformer, computes_in: torch.dtype, world: World) -> FullModel:
    """Train every weight of a `transformer` that is sharded over the ranks and gathered as `computes_in`; each rank its
    rows. fp32 rows are masters themselves.

    Raises:
        ConfigError: fp16 is `computes_in` and cannot hold one of this rank's weights.
    """
    transformer.requires_grad_(True)
    transformer.computes_in = computes_in
    shards = RowShards(transformer, world)
    for name, rows in shards.parameters.items():
        check_range(rows.data, computes_in, name)
    return FullModel(transformer, shards)
