"""What DeepSpeed does between ranks: how it sums gradients, and how long it waits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.ranks import in_ranks
from torch import nn

from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards, engine_settings

RANKS = 3
"""No power of two: a division by it rounds."""


def sharded(world: World) -> ZeroShards:
    model = nn.Linear(64, 8, bias=False).bfloat16()
    settings = engine_settings({"stage": 2}, torch.bfloat16, 1)
    return ZeroShards(model, dict(model.named_parameters()), settings, world)


def sums_exactly(world: World) -> bool:
    """Whether bf16 gradients are summed as they are. Those of each row are the rank's inputs; their sum is exact."""
    inputs = [torch.randn(1, 64, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(RANKS)]
    shards = sharded(world)
    shards.backward(shards.forward(inputs[world.rank]).sum())

    def gather() -> torch.Tensor | None:
        (gathered,) = (
            shards.whole_tensors({"weight": shards.parameters["weight"].grad}, to=1) or {"weight": None}
        ).values()
        return gathered

    gradient = shards.step(gather)
    return (
        gradient is None if world.rank != 1 else torch.equal(gradient, torch.cat(inputs).float().sum(0).expand(8, 64))
    )


def error_beside_silent_ranks(world: World) -> str:
    """Of rank 0, that waits for the others by the run's timeout: torch's own is half an hour."""
    assert world.heartbeats is not None
    shards = sharded(replace(world, heartbeats=replace(world.heartbeats, timeout_s=2.0)))
    message = ""
    if world.is_main:
        try:
            shards.backward(shards.forward(torch.ones(1, 64).bfloat16()).sum())
            shards.step(lambda: None)
        except RuntimeError as error:
            message = str(error)
    world.barrier("the rank that computes")
    return message


def try_out(world: World) -> list[Any]:
    return [sums_exactly(world), error_beside_silent_ranks(world)]


@pytest.mark.slow
def test_gradients_are_summed_exactly_and_a_silent_rank_is_noticed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    answers = in_ranks(RANKS, try_out)
    assert [is_exact for is_exact, _ in answers] == [True] * RANKS
    assert "imed out" in answers[0][1]
