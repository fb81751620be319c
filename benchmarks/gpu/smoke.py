"""Check that this device computes the same training step as the CPU: in fp32 and bf16, streamed, quantized, compiled.

    python benchmarks/gpu/smoke.py [--device cpu --tiny]

A small transformer with the same random weights on both devices. Errors are ‖device − CPU‖ / ‖CPU‖ over all gradients,
or over the velocity. Limits: 1e-4 in fp32, for sums in another order (TF32 would give about 1e-3 and fail); 5e-2 in
bf16 against fp32, because several products in a row are each rounded to 8 bits. Streamed steps must give the bits of
resident ones, with torch's plain attention: the backward passes of its other kernels add in an order that changes
between runs.

The checks are independent: one that raises has failed, and the others still run.
"""

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from measuring import Clock, parser
from models import spec_of, transformer
from results import report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import flow_loss, squared
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import attach
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute

CPU = torch.device("cpu")
SIGMA, GUIDANCE = (0.25, 0.5), (1.0, 4.0)
"""Exact in bf16, also when multiplied by a thousand: the time embedding does that in the model's own dtype."""
FP32_BOUND, BF16_BOUND = 1e-4, 5e-2
TEXT_TOKENS, GRID = 24, (6, 4)


class SmokeStep(NamedTuple):
    """Results of a step, on the CPU in fp32."""

    velocity: Tensor
    losses: Tensor
    gradients: Tensor
    """Those of all adapters, concatenated."""


def main() -> None:
    arguments = parser(__doc__).parse_args()
    device: torch.device = arguments.device
    clock = Clock(arguments.seconds)
    # As with `mixed_precision no`: fp32 without TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for check in CHECKS:
        if clock.left < 3:
            return
        try:
            check(device)
        except Exception as error:  # noqa: BLE001  whatever it is, the other checks are worth running
            traceback.print_exc()
            name = check.__name__.replace("_", " ")
            report("check", what=name, passed=False, note=f"{type(error).__name__}: {str(error)[:200]}")


def against_the_cpu(device: torch.device) -> None:
    """Compare velocity, loss and gradients in fp32 and in bf16 with the CPU's in fp32."""
    reference = stepped(model(CPU, torch.float32), CPU)
    for dtype, bound in ((torch.float32, FP32_BOUND), (torch.bfloat16, BF16_BOUND)):
        compare(
            f"a step in {str(dtype).removeprefix('torch.')} against the CPU in fp32",
            stepped(model(device, dtype), device),
            reference,
            bound,
        )


def streamed(device: torch.device) -> None:
    """Compare a streamed step, with a ring of one and of two groups, with a resident one."""
    with sdpa_kernel(SDPBackend.MATH):
        resident = stepped(model(device, torch.bfloat16, is_recomputed=True), device)
        for ring in (1, 2):
            moved = model(CPU, torch.bfloat16)
            offload.install(moved, offload.block_groups(moved.blocks), device=device, ahead=ring == 2)
            recompute.install(moved.blocks, inputs=recompute.HostInputs(device, ahead=ring == 2))
            equal(f"a streamed step, ring of {ring}, and a resident one", stepped(moved, device, times=3), resident)


def quantized(device: torch.device) -> None:
    """Compare a quantized step with the CPU's, and a streamed one with a resident one."""
    for precision in ("int8", "int4"):
        with sdpa_kernel(SDPBackend.MATH):
            resident = stepped(model(device, torch.bfloat16, precision, is_recomputed=True), device)
            moved = model(CPU, torch.bfloat16, precision)
            offload.install(moved, offload.block_groups(moved.blocks), device=device, ahead=True)
            recompute.install(moved.blocks)
            equal(f"a streamed step in {precision} and a resident one", stepped(moved, device, times=3), resident)
        reference = stepped(model(CPU, torch.bfloat16, precision), CPU)
        compare(f"a step in {precision} against the CPU", resident, reference, BF16_BOUND)


def compiled(device: torch.device) -> None:
    """Compare a compiled step with an eager one."""
    eager = stepped(model(device, torch.float32, is_recomputed=True), device)
    made = model(device, torch.float32)
    installed = compilation.install(made.blocks, backend="inductor", sizes_vary=False)
    recompute.install(made.blocks)
    compare("a compiled step in fp32 against an eager one", stepped(made, device), eager, FP32_BOUND)
    report("fact", name="compiler, small model", value=str(installed))


def text_padding(device: torch.device) -> None:
    """Compare the context of two prompts, including its padding row, on each attention kernel with the CPU's."""
    from simpletuner.flux2.load import load_text_encoder
    from simpletuner.flux2.source import locate

    source = locate(ModelOptions(model_flavour="tiny"), report=lambda _: None)

    def encode(where: torch.device) -> Tensor:
        encoder = load_text_encoder(source, torch.float32, where, fix_regex=False)
        return torch.cat([context.expanded() for context in encoder.encode(["a red square", "a blue circle on white"])])

    reference = encode(CPU)
    for kernel in (None, SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = "torch's choice" if kernel is None else kernel.name
        try:
            with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
                context = encode(device)
        except RuntimeError as error:
            report("fact", name=f"text encoder on {name}", value=str(error).splitlines()[0][:120])
            continue
        for what, rows in (("padding row", slice(0, 1)), ("context", slice(None))):
            close(f"text encoder's {what} on {name}", context[:, rows], reference[:, rows], FP32_BOUND)


def model(
    device: torch.device, dtype: torch.dtype, precision: str = "bf16", *, is_recomputed: bool = False
) -> Flux2Transformer:
    """A small transformer with adapters that are not zero, with the same numbers on every device."""
    spec = replace(spec_of("dev", tiny=True), double_blocks=2, single_blocks=2)
    made = transformer(spec, precision, CPU)
    if precision == "bf16":
        made.to(dtype)
    adapter = attach(made, LoraOptions(lora_rank=4, flux_lora_target="all"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.02, generator=generator)
    made.to(device).train()
    if is_recomputed:
        recompute.install(made.blocks)
    return made


def stepped(made: Flux2Transformer, device: torch.device, times: int = 1) -> SmokeStep:
    """The last of several steps without an update; the first ones let the ring record the order of groups."""
    generator = torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(2, 128, *GRID, generator=generator) for _ in range(2))
    rows = torch.randn(TEXT_TOKENS, made.spec.context_dim, generator=generator)
    context = TextContext(rows, torch.arange(TEXT_TOKENS).expand(2, -1))
    condition = Condition(context, torch.tensor(GUIDANCE)).mapped(lambda tensor: tensor.to(device))
    latents, noise, sigma = (tensor.to(device) for tensor in (latents, noise, torch.tensor(SIGMA)))
    denoise = Denoiser(made)
    losses = torch.empty(0)
    for _ in range(times):
        made.zero_grad(set_to_none=True)
        losses = flow_loss(denoise, latents, condition, sigma=sigma, noise=noise, penalty=squared)
        losses.mean().backward()
    with torch.no_grad():
        velocity = denoise(latents, sigma, condition)
    gradients = [parameter.grad.flatten() for parameter in made.parameters() if parameter.grad is not None]
    return SmokeStep(*(part.detach().float().cpu() for part in (velocity, losses, torch.cat(gradients))))


def compare(what: str, found: SmokeStep, expected: SmokeStep, bound: float) -> None:
    """Report velocity, loss and gradients."""
    close(f"{what}: velocity", found.velocity, expected.velocity, bound)
    close(f"{what}: losses", found.losses, expected.losses, bound)
    close(f"{what}: gradients", found.gradients, expected.gradients, bound)


def close(what: str, found: Tensor, expected: Tensor, bound: float) -> None:
    error = ((found - expected).norm() / expected.norm()).item()
    report("check", what=what, passed=bool(torch.isfinite(found).all()) and error <= bound, error=error, bound=bound)


def equal(what: str, found: SmokeStep, expected: SmokeStep) -> None:
    """Report whether all bits are equal."""
    ours, theirs = (torch.cat([part.flatten() for part in step]) for step in (found, expected))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    report("check", what=f"{what}: same bits", passed=torch.equal(ours, theirs), error=error, bound=0.0)


CHECKS: Sequence[Callable[[torch.device], None]] = (against_the_cpu, streamed, quantized, text_padding, compiled)

if __name__ == "__main__":
    main()
