"""How fast a step was: what is counted of a step is what the step computes."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.unit.flux2.test_arithmetic import FUSED, SPEC
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.config.data_sheets import DENSE_BF16_FLOP_PER_S
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route, resolve
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute
from simpletuner.train import optim
from simpletuner.train.rollout import Rollout, starts_of
from simpletuner.train.step import Objective, Stepper
from simpletuner.train.throughput import FlopMeter, data_sheet_rate

LENGTHS = ((0, 30, 5), (0, 0), (7,))
"""Of three micro-batches' samples; a rollout begins where it is not 0."""
SIZES = ((4, 6), (6, 4), (8, 4))

ROUTED = {"tread_config": {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -2}]}}


def micro_batches(objective: Objective, routes: Sequence[Route] = (), *, is_rolled: bool = False) -> Iterator[Batch]:
    slot = 0
    for lengths, (height, width) in zip(LENGTHS, SIZES, strict=True):
        slots = range(slot, slot + len(lengths))
        slot = slots.stop
        draws = objective.draw(1, slots, (SPEC.in_channels, height, width))
        yield Batch(
            latents=torch.randn(len(lengths), SPEC.in_channels, height, width),
            condition=Condition(TextContext.dense(torch.randn(len(lengths), 5, SPEC.context_dim)), draws.guidance),
            sigma=draws.sigma,
            noise=draws.noise,
            names=tuple(map(str, slots)),
            weights=torch.ones(len(lengths)),
            slots=slots,
            rollout=starts_of(lengths, draws.sigma) if is_rolled else None,
            choices=draw_choices(routes, 0, 1, slots, height * width),
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": False},
        pytest.param({"gradient_checkpointing_interval": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"scheduled_sampling_max_step_offset": 50, "scheduled_sampling_sampler": "heun"}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"scheduled_sampling_max_step_offset": 50, "scheduled_sampling_reflexflow": False}, marks=pytest.mark.slow
        ),
        pytest.param(ROUTED, marks=pytest.mark.slow),
        ROUTED | {"scheduled_sampling_max_step_offset": 50},
    ],
    ids=["recomputed", "kept", "partly", "rollout", "rollout without ReflexFlow", "routed", "routed rollout"],
)
def test_it_counts_what_a_step_computes(options: dict[str, Any]) -> None:
    config = RunConfig.model_validate({"lora_rank": 4} | options)
    transformer = Flux2Transformer(SPEC)
    adapter = attach(transformer, config, seed=0)
    if config.gradient_checkpointing:
        recompute.install(transformer.blocks, config.gradient_checkpointing_interval)
    routes = resolve(config.tread_routes, SPEC.blocks)
    denoiser = Denoiser(transformer.train())
    objective = Objective.of(config, config, seed=0)
    rollout = Rollout.of(config, seed=0)
    step = Stepper(
        denoise=denoiser,
        parameters=adapter.parameters(),
        optimizer=optim.build(adapter.parameters(), config),
        options=config,
        objective=objective,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
        route=denoiser.routed,
        rollout=rollout,
    )
    batches = tuple(micro_batches(objective, routes, is_rolled=rollout is not None))
    whole = GlobalBatch(1, 0, batches, sum(map(len, LENGTHS)))
    meter = FlopMeter(config, transformer, rollout, rate=1e12)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        step(whole, 0.0)
    assert meter.flop(whole).hardware == counter.get_total_flops()

    rates = meter.throughput(whole, 0.5)
    assert rates.images_per_s == 12
    assert rates.tflop_per_s == meter.flop(whole).model / 0.5e12
    assert rates.mfu == rates.tflop_per_s
    assert rates.hfu == counter.get_total_flops() / 0.5e12


def test_without_a_data_sheet_there_is_no_utilization() -> None:
    config = RunConfig()
    objective = Objective.of(config, config, seed=0)
    batches = tuple(micro_batches(objective))
    rate = data_sheet_rate(torch.device("cpu"))
    rates = FlopMeter(config, Flux2Transformer(SPEC), None, rate).throughput(GlobalBatch(1, 0, batches, 6), 2.0)
    assert rates.tflop_per_s > 0
    assert rates.mfu is None
    assert rates.hfu is None


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA"]
)
def test_a_part_of_a_card_and_a_namesake_have_no_rate(name: str) -> None:
    assert name not in DENSE_BF16_FLOP_PER_S
