"""What a run trains, as those see it that average it, draw with it, save it and go on with it."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from simpletuner.memory.masters import Masters


@runtime_checkable
class Trained(Protocol):
    """An adapter (`flux2.lora.Adapter`) or a whole transformer (`flux2.full.FullModel`)."""

    @property
    def masters(self) -> Masters | None:
        """fp32 copies on which the optimiser steps, where the weights themselves are too coarse."""

    @property
    def parameter_count(self) -> int:
        """Numbers that are trained."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimiser steps on, by name."""

    def parameters(self) -> list[nn.Parameter]:
        """The same without the names."""

    def disabled(self) -> AbstractContextManager[None] | None:
        """A block in which the model is the base model; None where training changes the base itself."""

    def holding(self, state: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A block in which the model computes with `state`."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors themselves (detached, not copied), by name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: other names or shapes.
        """
