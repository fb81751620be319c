"""The device computes what the CPU computes: velocity, loss and gradients, latents and pixels, contexts, kernels."""

import pytest
import torch
from accuracy import FACTORS, assert_as_exact, distance
from tiny_training import training_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from simpletuner.flux2.rotary import rotary
from simpletuner.flux2.source import Source
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import attend
from simpletuner.memory.precision import WeightLayout

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_velocity_loss_and_every_gradient(device: torch.device, dtype: torch.dtype) -> None:
    exact = training_results(torch.float64, CPU, dtype)
    on_cpu = training_results(dtype, CPU, dtype)
    found = training_results(dtype, device, dtype)
    assert len(exact[1]) == 2 * (2 * 12 + 6 * 2)
    for index in range(2):
        assert_as_exact(found[index], on_cpu[index], exact[index], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_to_latents_and_back(device: torch.device, source: Source, dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers", reason="the autoencoder is diffusers'")
    from simpletuner.flux2.load import load_autoencoder

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 6, 8, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(96, 128), mode="bilinear").to(dtype).float()
    latents = load_autoencoder(source, torch.float32, CPU).encode(pixels).to(dtype).float()

    def results(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        autoencoder = load_autoencoder(source, dtype, device)
        return {"latents": autoencoder.encode(pixels), "pixels": autoencoder.decode(latents)}

    exact = results(torch.float64, CPU)
    assert exact["pixels"].std() > 0.1, "not one gray"
    assert_as_exact(results(dtype, device), results(dtype, CPU), exact, dtype)


KERNELS = {
    "default": None,
    "plain": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_contexts_and_their_padding_row(device: torch.device, source: Source, dtype: torch.dtype, kernel: str) -> None:
    """Padding is a part of what the transformer sees, so its row must not depend on the kernel."""
    from simpletuner.flux2.load import load_text_encoder

    prompts = ["a red square on a blue ground", "a flag"]

    def results(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        encoder = load_text_encoder(source, dtype, device, fix_regex=True)
        long, short = encoder.encode(prompts)
        assert torch.equal(long.rows[0], short.rows[0])
        return {"padding": long.rows[0], "long": long.rows[1:], "short": short.rows[1:]}

    found = with_kernel(lambda: results(dtype, device), kernel)
    assert all(rows.isfinite().all() for rows in found.values())
    assert_as_exact(found, results(dtype, CPU), results(torch.float64, CPU), dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_and_its_gradients(device: torch.device, dtype: torch.dtype, kernel: str) -> None:
    """At the width of FLUX.2's heads, 128, and with a number of tokens that is no multiple of a tile."""
    text, height, width = 77, 13, 20
    shape = (2, text + height * width, 3, 128)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype).float() for _ in range(4)]
    ids = torch.cat([context_ids(text), image_ids(height, width)])

    def results(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        query, key, value, weight = (tensor.to(device, dtype, copy=True) for tensor in inputs)
        learned = [tensor.requires_grad_() for tensor in (query, key, value)]
        out = attend(query, key, value, rotary(ids.to(device), (32, 32, 32, 32), 2000.0))
        gradients = torch.autograd.grad(out, learned, weight.flatten(2))
        return {"out": out.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}

    found = with_kernel(lambda: results(dtype, device), kernel)
    assert_as_exact(found, results(dtype, CPU), results(torch.float64, CPU), dtype)


def with_kernel(compute, kernel: str):  # type: ignore[no-untyped-def]
    """What `compute` gives with one kernel of attention; skips where the device has none such for these inputs."""
    backend = KERNELS[kernel]
    if backend is None:
        return compute()
    with sdpa_kernel(backend):
        try:
            return compute()
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            if kernel == "plain":
                raise
            pytest.skip(f"no {kernel} attention for this here")


@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_product_in_eight_bits(cuda: torch.device, rows: int) -> None:
    """fp8-torchao's: a CPU checks none of the layouts that the GPU's kernel wants.

    5 %: input and weight are both rounded to 3 bits after the point, a relative error of 1/16 at most, 2 % on the
    average; over a sum of 192 products the errors of both add up as random ones do.
    """
    if torch.cuda.get_device_capability(cuda) < (8, 9):
        pytest.skip("no products in 8 bits on this GPU")
    generator = torch.Generator().manual_seed(0)
    layout = WeightLayout("fp8-torchao", (64, 192))
    weight = torch.randn(layout.shape, generator=generator)
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    data = (weight / scale).to(torch.float8_e4m3fn)
    x = torch.randn(rows, 192, generator=generator)
    found = layout.product(x.to(cuda, torch.bfloat16), (data.to(cuda), scale.to(cuda)))
    assert found.dtype == torch.bfloat16
    assert distance(found, x @ weight.T) < 0.05


def test_the_bounds_tell_tf32_from_fp32() -> None:
    """What these tests would find of products that lose 13 bits of 23, emulated on the CPU."""

    def rounded(tensor: Tensor) -> Tensor:
        bits = tensor.view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    a, b = (torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    exact = a.double() @ b.double()
    assert distance(rounded(a) @ rounded(b), exact) > 10 * FACTORS[torch.float32] * distance(a @ b, exact)
