"""Full training: every weight of the transformer is a trainable parameter."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn

from simpletuner.flux2.learning import TrainableParameters
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.masters import Masters, SteppedParameters
from simpletuner.memory.precision import check_range
from simpletuner.memory.row_shards import RowShards
from simpletuner.memory.world import World


class WeightKind(TypedDict):
    """The weights that have the same name in their blocks."""

    name: str
    tensors: int
    parameters: int


class WeightAudit(TypedDict):
    """Summary of the trainable weights, for reports and JSON.

    `weight_bytes` is the size of the weights that the model computes with, `master_bytes` that of fp32 masters.
    """

    dtype: str
    tensors: int
    parameters: int
    weight_bytes: int
    master_bytes: int
    kinds: list[WeightKind]


class FullModel(TrainableParameters):
    """Every weight of a transformer, by diffusers' names.

    The optimizer steps the weight itself, its fp32 master if there is one, or this rank's rows of it if it is sharded.
    """

    foreign_state = "weights of another model"

    def __init__(self, transformer: Flux2Transformer, masters: SteppedParameters | None) -> None:
        self.transformer = transformer
        self.masters = masters

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        return dict(self.transformer.named_parameters())

    def disabled(self) -> None:
        """Return None: after the first step the base model no longer exists."""

    @contextlib.contextmanager
    def with_weights(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        if not isinstance(self.masters, Masters):
            with super().with_weights(state):
                yield
            return
        # The masters keep their values; only the weights take those of `state`.
        self.masters.show(state)
        try:
            yield
        finally:
            self.masters.update_weights()

    def by_role(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Matrices of the blocks; matrices outside them (embedders, modulation, last layers); scales of the norms."""
        inner: list[nn.Parameter] = []
        outer: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        for (name, parameter), shape in zip(self.named_parameters(), self.whole_shapes, strict=True):
            is_inner = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
            (scales if len(shape) < 2 else inner if is_inner else outer).append(parameter)
        return inner, outer, scales

    def audit(self) -> WeightAudit:
        """Count the trainable parameters, from the weights themselves."""
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


def unfreeze(transformer: Flux2Transformer, compute_dtype: torch.dtype | None = None) -> FullModel:
    """Make every weight of `transformer` trainable, norms and embedders included.

    Args:
        compute_dtype: dtype that the model computes in. The weights, which must be fp32, become masters. None keeps the
            weights' dtype, without masters.

    Raises:
        ConfigError: `compute_dtype` is fp16 and cannot represent a weight.
    """
    transformer.requires_grad_(True)
    fp32_masters = None if compute_dtype is None else Masters(dict(transformer.named_parameters()), compute_dtype)
    return FullModel(transformer, fp32_masters)


def unfreeze_sharded(transformer: Flux2Transformer, computes_in: torch.dtype, world: World) -> FullModel:
    """Make every weight of a sharded `transformer` trainable. All-gathers cast to `computes_in`.

    Each rank steps its own fp32 rows, which need no masters.

    Raises:
        ConfigError: `computes_in` is fp16 and cannot represent one of this rank's weights.
    """
    transformer.requires_grad_(True)
    transformer.computes_in = computes_in
    shards = RowShards(transformer, world)
    for name, rows in shards.parameters.items():
        check_range(rows.data, computes_in, name)
    return FullModel(transformer, shards)
