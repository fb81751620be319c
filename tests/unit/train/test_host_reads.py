"""A step reads the device once: losses and gradient norm together, before the optimizer steps."""

from collections.abc import Callable

import pytest
import torch
from tests.host_reads import MetaStepper, describe, host_reads
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.ema import EmaOptions
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.config.precisions import PRECISIONS
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.rollout import SOLVERS
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.lora import attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute
from simpletuner.memory.precision import QuantizedLinear, quantizable_linears, quantized, replace_by_empty
from simpletuner.train import optim
from simpletuner.train.ema import Ema
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective, Stepper
from simpletuner.train.trained import Trainable

CPU, META = torch.device("cpu"), torch.device("meta")
SPEC = TransformerSpec(
    heads=1, head_dim=8, double_blocks=1, single_blocks=2, context_dim=8, guidance_embeds=True, axes=(2, 2, 2, 2)
)
OBJECTIVE = Objective.of(ScheduleOptions(), GuidanceOptions(), 0)
ROUTES = (Route(0, 1, 0.5),)


def rollout(sampler: str) -> Rollout:
    options = {"scheduled_sampling_max_step_offset": 20, "scheduled_sampling_sampler": sampler}
    return Rollout(0, RolloutOptions.model_validate(options))


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.sum() > 0),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "in": lambda x: 1.0 in x,
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "masked write": lambda x: x.index_put_((x > 0,), torch.ones(())),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_seen(read: Callable[[Tensor], object]) -> None:
    with host_reads(CPU) as found:
        read(torch.ones(3))
    assert found


def test_a_copy_that_waits_is_seen_and_one_that_does_not_is_not() -> None:
    x = torch.ones(3)
    with host_reads(META) as found:
        x.to(META, non_blocking=True)
        torch.empty(3, device=META).copy_(x, non_blocking=True)
        x.tolist()
        assert not found
        x.to(META)
        torch.empty(3, device=META).copy_(x)
        torch.tensor([1.0], device=META)
        assert len(found) == 3


def adapter(dtype: torch.dtype, device: torch.device, dropout: float = 0.0) -> tuple[Flux2Transformer, Trainable]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer(SPEC).to(device, dtype)
    return transformer, attach(transformer, LoraOptions(lora_rank=2, lora_dropout=dropout), seed=0)


def whole_model(dtype: torch.dtype, device: torch.device) -> tuple[Flux2Transformer, Trainable]:
    transformer = Flux2Transformer(SPEC).to(device)
    return transformer, unfreeze(transformer, None if dtype == torch.float32 else dtype)


def global_batch(step: int) -> GlobalBatch:
    """Two micro-batches of two samples of 4 × 6 tokens."""
    batches = []
    for first in (0, 2):
        slots = range(first, first + 2)
        draws = OBJECTIVE.draw(step, slots, (128, 4, 6))
        context = TextContext.dense(torch.ones(2, 5, SPEC.context_dim))
        starts = rollout("euler").starts(step, slots, draws.sigma)
        assert starts is not None
        batches.append(
            Batch(
                latents=torch.ones(2, 128, 4, 6),
                condition=Condition(context, draws.guidance),
                sigma=draws.sigma,
                noise=draws.noise,
                names=("a", "b"),
                weights=torch.ones(2),
                slots=slots,
                rollout=starts,
                choices=draw_choices(ROUTES, 0, step, slots, 24),
            )
        )
    return GlobalBatch(step, 0, tuple(batches), 4)


def stepper(
    kind: type[Stepper],
    made: tuple[Flux2Transformer, Trainable],
    device: torch.device,
    sampler: str = "euler",
    **options: object,
) -> Stepper:
    transformer, trained = made
    chosen = OptimOptions(learning_rate=0.01, max_grad_norm=1.0, **options)  # type: ignore[arg-type]
    recompute.install(transformer.blocks)
    transformer.train()
    denoiser = Denoiser(transformer)
    return kind(
        denoise=denoiser,
        parameters=trained.parameters(),
        optimizer=optim.build(trained.parameters(), chosen),
        options=chosen,
        objective=OBJECTIVE,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=device,
        route=denoiser.routed,
        rollout=rollout(sampler),
        masters=trained.masters,
    )


def with_dropout(dtype: torch.dtype, device: torch.device) -> tuple[Flux2Transformer, Trainable]:
    return adapter(dtype, device, dropout=0.1)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(adapter, torch.float32, id="lora-fp32", marks=pytest.mark.slow),
        pytest.param(adapter, torch.bfloat16, id="lora-bf16"),
        pytest.param(with_dropout, torch.float32, id="dropout-fp32"),
        pytest.param(with_dropout, torch.bfloat16, id="dropout-bf16", marks=pytest.mark.slow),
        pytest.param(whole_model, torch.float32, id="full-fp32", marks=pytest.mark.slow),
        pytest.param(whole_model, torch.bfloat16, id="full-bf16"),
    ],
)
def test_a_step_reads_once(make: Callable[..., tuple[Flux2Transformer, Trainable]], dtype: torch.dtype) -> None:
    made = make(dtype, CPU)
    step = stepper(Stepper, made, CPU, optimizer="adamw" if dtype == torch.float32 else "adamw_bf16")
    average = Ema(made[1], EmaOptions(use_ema=True), CPU)
    before = [parameter.detach().clone() for parameter in step.parameters]
    for number in (1, 2):
        batch = global_batch(number)
        with host_reads(CPU) as found:
            step(batch, 0.01)
            average.update(number)
        assert len(found) == 1, describe(found)
        assert "tolist in " in found[0]
    assert any(not torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
@pytest.mark.parametrize("make", [adapter, pytest.param(whole_model, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_on_a_device_a_step_waits_for_nothing_but_that_read(
    make: Callable[..., tuple[Flux2Transformer, Trainable]], dtype: torch.dtype
) -> None:
    made = make(dtype, META)
    step = stepper(MetaStepper, made, META, optimizer="adamw_bf16")
    average = Ema(made[1], EmaOptions(use_ema=True), META)
    for number in (1, 2):
        batch = global_batch(number)
        with host_reads(META) as found:
            step(batch, 0.01)
            average.update(number)
        assert not found, describe(found)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_rollout_waits_for_nothing_on_a_device(sampler: str) -> None:
    step = stepper(MetaStepper, adapter(torch.bfloat16, META), META, sampler=sampler, optimizer="adamw_bf16")
    batch = global_batch(1)
    with host_reads(META) as found:
        step.backward(batch)
    assert not found, describe(found)


@pytest.mark.parametrize("precision", [name for name, known in PRECISIONS.items() if not known.needs_accelerator])
def test_a_quantized_weight_waits_for_nothing(precision: str) -> None:
    layer = quantized(torch.nn.Linear(128, 16, bias=False).bfloat16(), precision)
    room = torch.nn.Sequential(torch.nn.Linear(128, 16, bias=False).bfloat16())
    with torch.device("meta"):
        replace_by_empty(room, quantizable_linears(room, ("",), precision), precision, torch.bfloat16)
    x = torch.ones(2, 128, dtype=torch.bfloat16, requires_grad=True)
    with host_reads(CPU) as found:
        layer(x).sum().backward()
    assert not found, describe(found)
    on_device = room[0]
    assert isinstance(on_device, QuantizedLinear)
    with host_reads(META) as found:
        assert on_device.layout.unpacked(on_device.tensors, torch.bfloat16).is_meta
    assert not found, describe(found)
