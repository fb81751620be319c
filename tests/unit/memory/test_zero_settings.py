"""What `deepspeed_config` hands on to DeepSpeed changes how a model is trained, and not what it becomes."""

from typing import Any

import pytest
import torch
from tests.ranks import in_ranks
from torch import nn

from simpletuner.config.deepspeed import ZeroSettings
from simpletuner.config.run import RunConfig
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards, engine_settings

HOST = {"device": "cpu", "pin_memory": False}
SETTINGS: dict[int, list[dict[str, Any]]] = {
    1: [{"reduce_scatter": False, "offload_optimizer": HOST}],
    2: [
        {"overlap_comm": True, "contiguous_gradients": False, "reduce_bucket_size": 1e3, "allgather_bucket_size": 500},
        {"use_multi_rank_bucket_allreduce": False, "allgather_partitions": False, "offload_optimizer": HOST},
    ],
    3: [
        {
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        {
            "stage3_model_persistence_threshold": 100,
            "stage3_module_granularity_threshold": 1_000_000,
            "stage3_use_all_reduce_for_fetch_params": True,
        },
        {"stage3_allgather_sequential": True, "offload_optimizer": HOST, "offload_param": HOST},
    ],
}
"""By the stage: settings with other values than DeepSpeed's own, that are tried together."""


def trained(world: World, zero: dict[str, Any]) -> list[float]:
    """Losses, and the sum of each piece, of two steps of two micro-batches a rank. The first layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 64), nn.GELU(), nn.Linear(64, 47), nn.GELU(), nn.Linear(47, 5))
    model[0].requires_grad_(False)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    config = RunConfig(deepspeed_config={"zero_optimization": zero}, num_processes=world.size)
    shards = ZeroShards(model, weights, engine_settings(config.zero_optimization, torch.float32, 4), world)
    optimizer = torch.optim.AdamW(shards.parameters.values(), lr=1e-2)
    found = []
    for step in range(2):
        for micro_batch in range(2):
            draws = torch.Generator().manual_seed(4 * step + 2 * micro_batch + world.rank)
            inputs, targets = torch.randn(4, 33, generator=draws), torch.randn(4, 5, generator=draws)
            loss = (shards.forward(inputs) - targets).square().mean() / 4
            shards.backward(loss)
            found.append(float(loss))
        shards.step(optimizer.step)
    return [*found, *(float(piece.double().sum()) for piece in shards.parameters.values())]


def apart(world: World) -> list[str]:
    """The settings with which something else is trained than with DeepSpeed's own values."""
    found = []
    for stage, trials in SETTINGS.items():
        usual = trained(world, {"stage": stage})
        found += [f"{tried} at stage {stage}" for tried in trials if trained(world, {"stage": stage, **tried}) != usual]
    return found


def test_each_setting_is_tried() -> None:
    tried = [pair for trials in SETTINGS.values() for settings in trials for pair in settings.items()]
    defaults = {name: field.default for name, field in ZeroSettings.model_fields.items()}
    assert {"stage", *(name for name, _ in tried)} == set(defaults)
    assert not [name for name, value in tried if value == defaults[name]]


@pytest.mark.slow
def test_no_setting_changes_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled either: no compiler is found."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: none of its settings is tested")
    monkeypatch.setenv("PATH", "/nowhere")
    assert in_ranks(2, apart) == [[], []]
