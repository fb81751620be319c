"""Training state besides tensors. It contains no RNG state: every random draw is keyed by step and slot."""

from collections.abc import Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from simpletuner.config.datasets import Windows
from simpletuner.data.order import Cut

STATE_VERSION = 2


class TrainState(BaseModel):
    """The part of a checkpoint that is not tensors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    version: int = STATE_VERSION
    """Version of this schema."""
    step: int = 0
    """Finished optimizer steps."""
    micro_batches: int = 0
    """Micro-batches trained: the position in the data."""
    cuts: list[Cut] = Field(default_factory=list)
    """How steps were split into micro-batches before train_batch_size changed; empty if it never did."""
    skipped_steps: list[int] = Field(default_factory=list)
    """Steps, counted as finished, that were skipped because a loss or gradient was not finite."""
    held_out: dict[int, float] = Field(default_factory=dict)
    """Held-out loss by step, for the steps at which it was measured."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration of the run."""
    data: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each training dataset, by its id: `Manifest.fingerprint`."""
    windows: dict[str, Windows] = Field(default_factory=dict)
    """First and last "step" and "epoch" of each training dataset that is not active throughout."""
    model: dict[str, str] = Field(default_factory=dict)
    """Fingerprints of the transformer and of the models that made the caches."""
    scaler: dict[str, float] = Field(default_factory=dict)
    """The fp16 loss scaler's state; empty without fp16."""
    optimizer: dict[str, Any] = Field(default_factory=dict, validation_alias=AliasChoices("optimizer", "optimiser"))
    """Optimizer state other than tensors, as `optimizer_state.pack` returns it. Older checkpoints name it `optimiser`.
    """


def differing_names(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose fingerprints differ."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
