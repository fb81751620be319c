"""All that a run has to remember between two steps, and nothing else: every draw is keyed, so there is no RNG state."""

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
    """Of this schema."""
    step: int = 0
    """Optimizer steps that are finished."""
    micro_batches: int = 0
    """Micro-batches seen: where the data goes on."""
    cuts: list[Cut] = Field(default_factory=list)
    """How steps were cut into micro-batches before train_batch_size changed; empty where it never did."""
    skipped_steps: list[int] = Field(default_factory=list)
    """Steps among these that were not taken, since a loss or gradient was not finite."""
    held_out: dict[int, float] = Field(default_factory=dict)
    """Held-out loss by step, as far as it was measured."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The resolved configuration it was trained with."""
    data: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of each training set: its pictures, captions, crops, repeats and probability."""
    windows: dict[str, Windows] = Field(default_factory=dict)
    """First and last "step" and "epoch" of each training set that is not active throughout."""
    model: dict[str, str] = Field(default_factory=dict)
    """Fingerprint of the transformer, and of what made the caches."""
    scaler: dict[str, float] = Field(default_factory=dict)
    """The fp16 loss scaler's state; empty without fp16."""
    optimizer: dict[str, Any] = Field(default_factory=dict, validation_alias=AliasChoices("optimizer", "optimiser"))
    """The optimizer's state that is not a tensor, as `optimizer_state.pack` has it. Older checkpoints name it
    `optimiser`."""


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose fingerprint is not what it was."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
