"""The plan's shards against those that two processes hold."""

import pytest
import torch
from tests.ranks import in_ranks

from simpletuner.config.flavours import TINY
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.flux2.stored import BLOCKS
from simpletuner.flux2.transformer import empty_transformer
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.precision import quantizable_linears, quantized_from, replace_by_empty
from simpletuner.memory.shard import Sharding, local_bytes, shard
from simpletuner.memory.world import World

PRECISIONS = ("no_change", "int8-quanto")


def sharded_bytes(world: World) -> list[int]:
    """What this rank holds of the tiny model in each of `PRECISIONS`."""
    held = []
    for precision in PRECISIONS:
        empty_transformer.cache_clear()
        transformer = empty_transformer(TINY)
        if precision != "no_change":
            linears = quantizable_linears(transformer, BLOCKS, precision)
            with torch.device("meta"):
                replace_by_empty(transformer, linears, precision, quantized_from(torch.float32))
        transformer.requires_grad_(False)
        shard(transformer, transformer.blocks, Sharding(world.device))
        held.append(local_bytes(transformer.parameters()))
    return held


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_hold_what_is_planned(ranks: int) -> None:
    found = in_ranks(ranks, sharded_bytes)
    for index, precision in enumerate(PRECISIONS):
        options = {"model_flavour": "tiny", "mixed_precision": "no", "num_processes": ranks, "fsdp_enable": True}
        config = RunConfig.model_validate({**options, "base_model_precision": precision})
        machine = MachineMemory(None, 1 << 40, None)
        plan = Footprint(config, Architecture.of(config), Workload((64, 64), 1, samples_images=False), machine).train()
        (planned,) = [each.size for each in plan.parts if each.name == "shards of weights"]
        assert planned == pytest.approx(ranks * found[0][index], rel=1e-3), "with the padding of the last rank"
        assert planned >= sum(each[index] for each in found)
