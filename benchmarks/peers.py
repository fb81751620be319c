"""A training step of this program against diffusers and peft, on the same weights, shapes and targets, in one process.

    python benchmarks/peers.py [--pairs 8] [--steps 2] [--batch 4] [--size 128] [--text 64] [--threads 1]

The embedded model's transformer with an adapter of rank 16 on every Linear of its blocks. Theirs is a plain loop
around diffusers' `Flux2Transformer2DModel` with peft's LoRA, ours is the program's `Stepper`. Both get the same
noise, sigmas and contexts, clip to the same norm and step with the same optimizer, so the losses of all steps must be
equal to rounding; otherwise the script fails. Adapters are fp32 in both. On a bf16 base, peft computes them in fp32,
this program in bf16.

Measures the processor time of this process, on one thread: with more, waiting threads would count as if they worked. A
pair is a few steps of each, one after the other; every other pair begins with the other one. Prints the median of the
pairs' ratios, with the quartiles.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.base.quiet import quiet_import
from simpletuner.config.flavours import TINY
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.spec import transformer_to_diffusers
from simpletuner.flux2.tokens import PIXELS_PER_TOKEN, context_ids, image_ids, pack_latents
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import recompute
from simpletuner.train import optim
from simpletuner.train.step import Objective, Stepper

Step = Callable[[], float]
"""Trains one step and returns its loss."""

CONFIG = RunConfig(learning_rate=1e-3, lora_rank=16)
OBJECTIVE = Objective.of(CONFIG, CONFIG, CONFIG.seed)
TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
"""Relative tolerance of a step's loss, which contains the rounding of all earlier steps."""
CASES = ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True))
"""Dtype, and whether blocks are recomputed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a pair")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="edge of the images in pixels")
    parser.add_argument("--text", type=int, default=64, help="tokens of each context")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, load average {os.getloadavg()[0]:.1f}")
    for dtype, is_recomputed in CASES:
        compare(dtype, is_recomputed, arguments)


def compare(dtype: torch.dtype, is_recomputed: bool, arguments: argparse.Namespace) -> None:
    """Time both, print a line, and fail if their losses differ."""
    ours, theirs = steppers(dtype, is_recomputed, batch_of(arguments))
    losses: dict[str, list[float]] = {"ours": [ours()], "theirs": [theirs()]}  # both do their one-time set-up
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(arguments.pairs):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, step in sides if pair % 2 else reversed(sides):
            began = time.process_time()
            losses[name] += [step() for _ in range(arguments.steps)]
            seconds[name].append((time.process_time() - began) / arguments.steps)
    both = list(zip(losses["ours"], losses["theirs"], strict=True))
    differences = [abs(mine - other) / other for mine, other in both]
    worst = max(differences)
    if worst > TOLERANCE[dtype]:
        mine, other = both[differences.index(worst)]
        raise SystemExit(f"a step's losses differ by {worst:.1e}: {mine} here, {other} with diffusers and peft")
    ratios = [mine / other for mine, other in zip(seconds["ours"], seconds["theirs"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    kind = f"{str(dtype).removeprefix('torch.')}, blocks {'recomputed' if is_recomputed else 'kept'}"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{kind}: here {medians['ours']:.3f} s of processor time a step, diffusers and peft {medians['theirs']:.3f}; "
        f"ratio {median:.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs); "
        f"{len(both)} losses differ by {worst:.1e} at most",
        flush=True,
    )


def batch_of(arguments: argparse.Namespace) -> Batch:
    """Random latents and contexts; sigma and noise are drawn for each step."""
    edge = arguments.size // PIXELS_PER_TOKEN
    generator = torch.Generator().manual_seed(0)
    slots = range(arguments.batch)
    context = torch.randn(arguments.batch, arguments.text, TINY.context_dim, generator=generator)
    draws = OBJECTIVE.draw(1, slots, (TINY.in_channels, edge, edge))
    return Batch(
        latents=torch.randn(arguments.batch, TINY.in_channels, edge, edge, generator=generator),
        condition=Condition.at(TextContext.dense(context), 4.0),
        sigma=draws.sigma,
        noise=draws.noise,
        names=tuple(map(str, slots)),
        weights=torch.ones(arguments.batch),
        slots=slots,
    )


def steppers(dtype: torch.dtype, is_recomputed: bool, batch: Batch) -> tuple[Step, Step]:
    """Ours and theirs, with equal weights and adapters."""
    torch.manual_seed(0)
    transformer = Flux2Transformer(TINY).to(dtype).train()
    peers = peer_model(transformer)
    adapter = attach(transformer, CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():  # a new `b` is zero, so `a` would have no gradient
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    parameters = peer_adapter(peers, adapter)
    if is_recomputed:
        recompute.install(transformer.blocks)
        peers.enable_gradient_checkpointing()
    return our_step(transformer, adapter, batch), peer_step(peers, parameters, batch, dtype)


def our_step(transformer: Flux2Transformer, adapter: Adapter, batch: Batch) -> Step:
    stepper = Stepper(
        denoise=Denoiser(transformer),
        parameters=adapter.parameters(),
        optimizer=optim.build(adapter.parameters(), CONFIG),
        options=CONFIG,
        objective=OBJECTIVE,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        device=torch.device("cpu"),
    )
    whole = GlobalBatch(1, 0, (batch,), len(batch.names))
    return lambda: stepper(whole, CONFIG.learning_rate).loss


def peer_model(transformer: Flux2Transformer) -> Any:
    """diffusers' transformer with the weights of ours."""
    with quiet_import():
        from diffusers import Flux2Transformer2DModel
        from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns about any cast
    config = {key: value for key, value in transformer_to_diffusers(TINY).items() if key != "_class_name"}
    peers = Flux2Transformer2DModel(**config).to(transformer.dtype)
    peers.load_state_dict(transformer.state_dict())
    return peers.requires_grad_(False).train()


def peer_adapter(peers: Any, adapter: Adapter) -> list[nn.Parameter]:
    """Put peft's LoRA where `adapter` is, with its values; returns its parameters in fp32."""
    with quiet_import():
        from peft import LoraConfig

    peers.add_adapter(LoraConfig(r=CONFIG.lora_rank, lora_alpha=CONFIG.alpha, target_modules=list(adapter.layers)))
    parameters: list[nn.Parameter] = []
    for name, layer in adapter.layers.items():
        pair = peers.get_submodule(name)
        for values, linear in ((layer.a, pair.lora_A["default"]), (layer.b, pair.lora_B["default"])):
            linear.weight = nn.Parameter(values.detach().clone())
            parameters.append(linear.weight)
    return parameters


def peer_step(peers: Any, parameters: list[nn.Parameter], batch: Batch, dtype: torch.dtype) -> Step:
    """The loop that training scripts write around diffusers and peft."""
    optimizer = optim.build(parameters, CONFIG)
    height, width = batch.latents.shape[-2:]
    context = batch.condition.context.expanded(dtype)
    positions, text_positions = image_ids(height, width), context_ids(context.shape[1])

    def step() -> float:
        sigma = batch.sigma[:, None, None, None]
        noised: Tensor = (1 - sigma) * batch.latents + sigma * batch.noise
        velocity = peers(
            hidden_states=pack_latents(noised).to(dtype),
            encoder_hidden_states=context,
            timestep=batch.sigma.to(dtype),
            guidance=batch.condition.guidance,
            img_ids=positions,
            txt_ids=text_positions,
            return_dict=False,
        )[0]
        loss = (velocity.float() - pack_latents(batch.noise - batch.latents)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value: float = loss.item()
        return value

    return step


if __name__ == "__main__":
    main()
