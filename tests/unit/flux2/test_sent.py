"""What processes send in a step, counted where torch.distributed is called, is what the plan says."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.ranks import in_ranks
from tests.unit.flux2.test_shards import GATHER, a_batch, adapted, base

from simpletuner.config.run import RunConfig
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.full import unfreeze_sharded
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.shard import Sharding, shard
from simpletuner.memory.wire import all_reduce_bytes, shard_exchange_bytes
from simpletuner.memory.world import World

WORK = Workload((64, 64), 2, samples_images=False)
LORA = {"lora_rank": 4, "flux_lora_target": "all"}
CASES: Mapping[str, dict[str, Any]] = {
    "ddp": LORA,
    "fsdp2": {**LORA, "fsdp_enable": True},
    "fsdp2, kept between the passes": {**LORA, "fsdp_enable": True, "fsdp_reshard_after_forward": False},
    "fsdp2, all weights": {"model_type": "full", "fsdp_enable": True},
}


class Sent:
    """Adds up what this rank sends in a ring."""

    def __init__(self, ranks: int) -> None:
        self.size = 0
        self._count(GATHER, 0, lambda size: shard_exchange_bytes(size, ranks))
        self._count("all_reduce", 0, lambda size: all_reduce_bytes(size, ranks))
        scatter = GATHER.replace("all_gather", "reduce_scatter").replace("into_tensor", "tensor")
        self._count(scatter, 1, lambda size: shard_exchange_bytes(size, ranks))

    def _count(self, name: str, whole: int, sent: Callable[[int], int]) -> None:
        """Count the calls of a collective, whose argument number `whole` is as large as all shards."""
        collective = getattr(torch.distributed, name)

        def counted(*given: Any, **named: Any) -> Any:
            self.size += sent([*given, *named.values()][whole].nbytes)
            return collective(*given, **named)

        setattr(torch.distributed, name, counted)


def sent(world: World) -> dict[str, list[int]]:
    """Of each case: what this rank sends for two micro-batches, and what the plan says."""
    counted = Sent(world.size)
    answers = {}
    for name, options in CASES.items():
        config = RunConfig.model_validate(
            {**options, "mixed_precision": "no", "num_processes": world.size, "gradient_accumulation_steps": 2}
        )
        transformer = base()
        whole = config.model_type == "full"
        if config.fsdp_enable:
            sharding = Sharding(world.device, config.fsdp_reshard_after_forward)
            shard(
                transformer.requires_grad_(whole),
                transformer.blocks,
                replace(sharding, gather_dtype=torch.float32) if whole else sharding,
            )
        trained = unfreeze_sharded(transformer, torch.float32, world) if whole else adapted(transformer)
        counted.size = 0
        for number in range(2):
            batch = a_batch(range(2 * number, 2 * number + 2))
            Denoiser(transformer)(batch.latents, batch.sigma, batch.condition).square().mean().backward()
        if not whole:
            world.sum_([each.grad for each in trained.parameters() if each.grad is not None])
        wire = Footprint(
            config,
            replace(Architecture.of(config), transformer=transformer.spec),
            WORK,
            MachineMemory(None, 1 << 50, None),
        ).wire
        answers[name] = [counted.size, 0 if wire is None else wire.total]
    return answers


@pytest.mark.slow
def test_the_plan_counts_what_processes_send() -> None:
    for answer in in_ranks(2, sent):
        assert set(answer) == set(CASES)
        assert all(counted == planned > 0 for counted, planned in answer.values()), answer
