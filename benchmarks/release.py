"""Measure peak tensor memory and CPU seconds of a full-training step, with and without `optimizer_release_gradients`.

python benchmarks/release.py [--steps 6]     (half a minute on two idle cores)

One process and one model of 40 million parameters, on a CPU; the variants alternate step by step, so compare their
ratios. Bytes are those of all tensors except the weights, optimizer state included, with the plan's for comparison.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.optim import OptimOptions
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.activations import TransformerPass, training
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.footprint import STEP_BYTES
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import recompute
from simpletuner.memory.trace import Ledger
from simpletuner.train import optim
from simpletuner.train.release import GradientRelease, StepsOneParameter

SPEC = TransformerSpec(
    heads=4, head_dim=128, double_blocks=2, single_blocks=6, context_dim=512, guidance_embeds=True, axes=(32,) * 4
)
TEXT, SIDE = 64, 12


class Variant:
    """A model and its optimizer."""

    def __init__(self, name: str, *, releases: bool) -> None:
        torch.manual_seed(0)
        self.label = f"{name}{', released' if releases else ''}"
        self.options = OptimOptions(
            optimizer=name, learning_rate=1e-3, max_grad_norm=0, optimizer_release_gradients=releases
        )
        has_masters = name == "adafactor" and not releases
        transformer = Flux2Transformer(SPEC).to(torch.float32 if has_masters else torch.bfloat16)
        self.trained = unfreeze(transformer, torch.bfloat16 if has_masters else None)
        self.denoise = Denoiser(transformer)
        self.transformer = transformer.train()
        recompute.install(transformer.blocks)
        self.optimizer = optim.build(self.trained.parameters(), self.options)
        self.release: GradientRelease | None = None
        if releases:
            assert isinstance(self.optimizer, StepsOneParameter)
            self.release = GradientRelease(self.trained.parameters(), self.optimizer, self.options)

    def step(self) -> None:
        latents = torch.randn(1, 128, SIDE, SIDE)
        context = torch.randn(1, TEXT, SPEC.context_dim, dtype=torch.bfloat16)
        sigma = torch.full((1,), 0.5)
        loss = (self.denoise(latents, sigma, Condition.at(TextContext.dense(context), 1.0)) - latents).square().mean()
        if self.release is not None:
            self.release.backward(loss)
            return
        loss.backward()
        if self.trained.masters is not None:
            self.trained.masters.take_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.trained.masters is not None:
            self.trained.masters.update_weights()

    @property
    def state_bytes(self) -> int:
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))

    def peak(self) -> int:
        """Peak bytes of a step, without weights, masters and state."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        known = [*self.transformer.parameters(), *self.trained.parameters(), *states]
        with Ledger([each for each in known if isinstance(each, torch.Tensor)]) as ledger:
            self.step()
        peak: int = ledger.peak
        return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    variants = [Variant(name, releases=releases) for name in ("adamw_bf16", "adafactor") for releases in (False, True)]
    seconds: dict[str, list[float]] = {variant.label: [] for variant in variants}
    for index in range(steps + 1):
        for variant in variants:
            began = time.process_time()
            variant.step()
            if index:
                seconds[variant.label].append(time.process_time() - began)
    count = sum(weight.numel() for weight in variants[0].transformer.parameters())
    print(f"{count / 1e6:.1f} million parameters, {SIDE * SIDE} + {TEXT} tokens; MB but for the seconds\n")
    print("| variant | weights and masters | state | peak of a step beside them | planned | CPU s/step |")
    print("|---|---|---|---|---|---|")
    for variant in variants:
        print(row(variant, seconds[variant.label], count))


def row(variant: Variant, seconds: Sequence[float], count: int) -> str:
    is_released = variant.release is not None
    at = TransformerPass(
        SPEC, torch.bfloat16, 1, TEXT, SIDE**2, is_full=True, is_released=is_released, recomputed=(True,) * SPEC.blocks
    )
    has_masters = variant.trained.masters is not None
    planned = max(training(at).total, 0 if is_released else count * (4 if has_masters else 2))
    planned += STEP_BYTES["ram"] if is_released else 0
    sizes = [count * (6 if has_masters else 2), variant.state_bytes, variant.peak(), planned]
    return (
        f"| {variant.label} | {' | '.join(f'{size / 1e6:.1f}' for size in sizes)} | {statistics.median(seconds):.3f} |"
    )


if __name__ == "__main__":
    main()
