"""A small FLUX.2 with adapters, its batches and its training step, on any device and in any precision."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simpletuner.config.flavours import TINY, TransformerSpec
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.options.precision import PrecisionName
from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import flow_loss
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.tiny.make import SHIPPED, TRANSFORMER
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload
from simpletuner.memory.precision import quantizable_linears, replace_by_empty
from simpletuner.memory.tensors import load_tensors
from simpletuner.train import optim
from simpletuner.train.step import Objective, Stepper

WITHOUT_LIBRARY: tuple[PrecisionName, ...] = ("int8-quanto", "int4-quanto")
"""Formats that can be filled with random numbers, so that no library of theirs is needed."""

SMALL = replace(TINY, double_blocks=2, single_blocks=4)
GRID, TEXT_TOKENS = (4, 6), 16
RATE = 1e-3

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_SPREAD = {"int8-quanto": 74.0, "int4-quanto": 4.6}
"""Standard deviation of an even draw of all numbers of a format."""


def random_model(
    dtype: torch.dtype, precision: PrecisionName = "no_change", spec: TransformerSpec = SMALL
) -> tuple[Flux2Transformer, Adapter]:
    """A transformer of random weights on the CPU, and the adapter on every Linear of its blocks. The same each time."""
    with torch.device("meta"):
        model = Flux2Transformer(spec).to(dtype).requires_grad_(False)
        if precision != "no_change":
            replace_by_empty(model, quantizable_linears(model, _BLOCKS, precision), precision, dtype)
    model.to_empty(device="cpu")
    fill_randomly(model, precision)
    return model, adapted(model)


@torch.no_grad()
def fill_randomly(module: nn.Module, precision: str, deviation: float = 0.05) -> None:
    """Give matrices of `module`, quantized ones in `precision`, about this standard deviation, and norms weights of
    about one. The same each time on the same device.
    """
    tensors = module.state_dict()
    generator = torch.Generator(next(iter(tensors.values())).device).manual_seed(0)
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind == "weight":
            tensor.normal_(mean=float(tensor.ndim == 1), std=deviation, generator=generator)
        elif kind == "data":
            tensor.random_(generator=generator)
        else:
            scale = deviation / _SPREAD[precision]
            tensor.fill_({"scale": scale, "shift": 7.5 * scale}[kind])


def embedded_transformer(dtype: torch.dtype) -> tuple[Flux2Transformer, Adapter]:
    """The embedded model's transformer with its trained weights on the CPU, and an adapter on every Linear."""
    model = Flux2Transformer(TINY)
    model.load_state_dict(load_tensors(SHIPPED / TRANSFORMER))
    return model.to(dtype), adapted(model)


def adapted(model: Flux2Transformer, rank: int = 4) -> Adapter:
    """An adapter in training whose gradients are all other than zero: B is drawn too."""
    adapter = attach(model, LoraOptions(lora_rank=rank, flux_lora_target="all"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.02, generator=generator)
    model.train()
    return adapter


def objective() -> Objective:
    return Objective.of(ScheduleOptions(), GuidanceOptions(), 0)


def global_batch(
    step: int,
    *,
    samples: int = 2,
    grid: tuple[int, int] = GRID,
    text: int = TEXT_TOKENS,
    context_dim: int = SMALL.context_dim,
    batches: int = 1,
) -> GlobalBatch:
    """Random micro-batches on the CPU, the same for the same arguments."""
    made: list[Batch] = []
    for index in range(batches):
        generator = torch.Generator().manual_seed(1000 * step + index)
        slots = range(index * samples, (index + 1) * samples)
        draws = objective().draw(step, slots, (128, *grid))
        context = torch.randn(samples, text, context_dim, generator=generator)
        latents = torch.randn(samples, 128, *grid, generator=generator)
        condition = Condition(TextContext.dense(context), draws.guidance)
        names = tuple(f"random/{slot}" for slot in slots)
        made.append(Batch(latents, condition, draws.sigma, draws.noise, names, torch.ones(samples), slots))
    return GlobalBatch(step, 0, tuple(made), samples * batches)


def stepper(model: Flux2Transformer, adapter: Adapter, device: torch.device) -> Stepper:
    """The training step of a model that is ready on `device`."""
    options = OptimOptions(learning_rate=RATE)
    parameters = list(adapter.parameters())
    return Stepper(
        denoise=Denoiser(model),
        parameters=parameters,
        optimizer=optim.build(parameters, options),
        options=options,
        objective=objective(),
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        device=device,
    )


def training_results(
    dtype: torch.dtype,
    device: torch.device,
    rounded_to: torch.dtype,
    install: Callable[[Flux2Transformer], object] = lambda _model: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Velocity and losses of two samples by the embedded model; and the gradient of each tensor of its adapter.

    Weights and inputs are numbers of `rounded_to`, so that every type computes the same problem. `install` is called
    with the model on its device, to change how it computes.
    """
    model, adapter = embedded_transformer(rounded_to)
    model.to(device, dtype)
    for parameter in adapter.parameters():
        parameter.data = parameter.data.to(rounded_to).float()
    (batch,) = global_batch(1, grid=(6, 10), text=24, context_dim=TINY.context_dim).batches
    batch = batch.mapped(lambda tensor: tensor.to(rounded_to).float() if tensor.is_floating_point() else tensor)
    # Of bf16's numbers these stay exact when the model multiplies them by 1000.
    condition = Condition(batch.condition.context, torch.tensor([1.0, 4.0]))
    batch = replace(batch, sigma=torch.tensor([0.25, 0.5]), condition=condition).to(device)
    install(model)
    denoise, velocities = Denoiser(model), []

    def observed(*inputs: Any) -> Tensor:
        velocities.append(denoise(*inputs))
        return velocities[-1]

    losses = flow_loss(observed, batch.latents, batch.condition, sigma=batch.sigma, noise=batch.noise)
    losses.mean().backward()
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"velocity": velocities[0].detach(), "losses": losses.detach()}, gradients


Trained = tuple[list[float], list[float], list[Tensor]]
"""Loss of each step, gradient norm of each step, and the adapter's parameters at the end, on the CPU."""


def train(trained: Stepper, steps: int) -> Trained:
    """Take `steps` steps, each on batches of its own."""
    results = [trained(global_batch(step), RATE) for step in range(1, steps + 1)]
    parameters = [parameter.detach().cpu() for parameter in trained.parameters]
    return [result.loss for result in results], [result.grad_norm for result in results], parameters


def assert_same_bits(found: Trained, expected: Trained) -> None:
    losses, expected_losses = found[0], expected[0]
    first = next((step for step, pair in enumerate(zip(losses, expected_losses, strict=True)) if pair[0] != pair[1]), 0)
    assert losses == expected_losses, f"the losses differ from step {first + 1} on"
    assert found[1] == expected[1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[2], expected[2], strict=True))


Level = Literal["block", "leaf"]


def groups_of(blocks: Sequence[nn.Module], level: Level) -> list[list[nn.Module]]:
    """The modules that are streamed together."""
    return offload.block_groups(blocks) if level == "block" else offload.leaf_groups(blocks)
