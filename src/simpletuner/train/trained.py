"""Interface of the trainable parameters, used by EMA, validation, checkpoints and resume."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.row_shards import Shards


@runtime_checkable
class Trained(Protocol):
    """An adapter (`flux2.lora.Adapter`) or a whole transformer (`flux2.full.FullModel`)."""

    masters: SteppedParameters | None
    """What the optimizer steps on in place of the weights: fp32 copies where those are too coarse, or this rank's share
    where ranks share them out.
    """

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The model's own parameters that are trained, by name."""

    @property
    def shards(self) -> Shards | None:
        """Where the ranks share out the parameters: `named_parameters`, `state` and `load` then are about this rank's
        share, and gradients are summed over the ranks by FSDP2 or DeepSpeed. None where each rank holds all of them.
        """

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained, on all ranks together."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer steps on, by name."""

    def parameters(self) -> list[nn.Parameter]:
        """The same without the names."""

    def disabled(self) -> AbstractContextManager[None] | None:
        """A block in which the model is the base model; None where training changes the base itself."""

    def holding(self, state: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A block in which the model computes with `state`."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors themselves (detached, not copied), by name; of shared-out ones this rank's share."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: other names or shapes.
        """
