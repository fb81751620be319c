"""Measure the error of each precision of the base on the embedded model, in its velocity and in the gradients.

    python benchmarks/precision.py [--width 384] [--seed 0]

For every precision that runs here: bits a weight of a block, scales and other tensors included; the error of the
velocity, |quantized - bf16| / |bf16|; the cosine between the gradients of a rank-16 adapter on all Linears and those
over the bf16 base, all gradients as one vector; seconds of a forward and backward pass. The adapter's `b` is random
instead of zero, as if it had been trained: otherwise the gradients of `a` would be zero.
"""

import argparse
import dataclasses
import tempfile
import time

import torch
from torch import Tensor

from simpletuner.base.errors import ConfigError
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.precisions import NO_CHANGE, PRECISIONS
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.lora import attach
from simpletuner.flux2.source import Source, locate
from simpletuner.memory.precision import QuantizedLinear, check_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="edge of the square image in pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="simpletuner-precision-") as name:
        source = locate(ModelOptions(model_flavour="tiny", cache_dir=name), report=print)
        plain = measured(source, NO_CHANGE, given.width, given.seed, device)
        print(f"{'precision':<16}{'bits':>6}{'error':>9}{'cosine':>9}{'seconds':>9}")
        print(f"{'bf16':<16}{plain.bits:>6.2f}{0:>9}{1:>9}{plain.seconds:>9.3f}")
        for precision in PRECISIONS:
            try:
                check_precision(precision, device, "base_model_precision")
            except ConfigError as refused:
                print(f"{precision:<16}refused: {refused.problems[0].found}")
                continue
            found = measured(source, precision, given.width, given.seed, device)
            error = (found.velocity - plain.velocity).norm() / plain.velocity.norm()
            cosine = torch.cosine_similarity(found.gradients, plain.gradients, dim=0)
            print(f"{precision:<16}{found.bits:>6.2f}{error:>9.4f}{cosine:>9.4f}{found.seconds:>9.3f}")


@dataclasses.dataclass(frozen=True)
class Measured:
    velocity: Tensor
    gradients: Tensor
    bits: float
    seconds: float


def measured(source: Source, precision: str, width: int, seed: int, device: torch.device) -> Measured:
    transformer = load_transformer(source, torch.bfloat16, device, precision)
    held = [module for module in transformer.modules() if isinstance(module, QuantizedLinear)]
    count = sum(linear.in_features * linear.out_features for linear in held)
    bits = 8 * sum(tensor.nbytes for linear in held for tensor in linear.tensors) / count if held else 16.0
    adapter = attach(transformer, LoraOptions(), seed=seed)
    draws = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(device)

    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.b.copy_(0.02 * drawn(*layer.b.shape))
    side = width // 16
    latents, context = drawn(1, 128, side, side), drawn(1, 64, source.spec.context_dim).bfloat16()
    target = drawn(1, 128, side, side)
    sigma, condition = torch.full((1,), 0.6, device=device), Condition.at(TextContext.dense(context), 1.0)
    denoise = Denoiser(transformer.train())
    seconds = []
    velocity = latents
    for _ in range(2):  # the first pass also warms up
        for parameter in adapter.parameters():
            parameter.grad = None
        began = time.monotonic()
        velocity = denoise(latents, sigma, condition).float()
        (velocity - target).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    gradients = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
    return Measured(velocity.detach(), gradients, bits, min(seconds))


if __name__ == "__main__":
    main()
