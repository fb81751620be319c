"""Interface of the trainable parameters, used by EMA, validation, checkpoints and resume."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import RankShards


@runtime_checkable
class Trainable(Protocol):
    """An adapter (`flux2.lora.Adapter`) or a whole transformer (`flux2.full.FullModel`)."""

    masters: SteppedParameters | None
    """Tensors that the optimizer steps in place of the weights: fp32 masters of low-precision weights, or this rank's
    shards of them. None where it steps the weights themselves.
    """

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The model's trainable parameters, by name."""

    @property
    def shards(self) -> RankShards | None:
        """The sharding of the parameters; None where each rank holds all of them. If sharded, `named_parameters`,
        `state` and `load` use this rank's shards, and FSDP2 or DeepSpeed sums gradients over the ranks.
        """

    @property
    def parameter_count(self) -> int:
        """Number of trainable parameters, over all ranks."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that the optimizer steps, by name."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps."""

    def disabled(self) -> AbstractContextManager[None] | None:
        """A context in which the model is the base model; None where training changes the base weights."""

    def with_weights(self, state: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which the model computes with `state`."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors by name, detached but not copied; this rank's shards if they are sharded."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore tensors that `state` returned.

        Raises:
            ValueError: names or shapes differ.
        """
