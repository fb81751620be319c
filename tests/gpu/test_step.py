"""A training step on the device: how often the host waits for it, and what compiling changes."""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from accuracy import assert_as_exact
from tiny_training import GRID, RATE, global_batch, groups_of, random_model, stepper, training_results

from simpletuner.config.options.tread import TreadRoute
from simpletuner.data.batch import GlobalBatch
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.routes import resolve
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute
from simpletuner.train.step import Stepper


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each call of `Stepper.read` read. Waiting is allowed inside of it."""
    counts: list[int] = []
    read = Stepper.read

    def counted(trained: Stepper, values: torch.Tensor) -> list[float]:
        counts.append(values.numel())
        with waits(values.device, "default"):
            return read(trained, values)

    monkeypatch.setattr(Stepper, "read", counted)
    return counts


@contextlib.contextmanager
def waits(device: torch.device, mode: Literal["default", "error"]) -> Iterator[None]:
    """Whether it is an error in this block that the host waits for the device. A CPU never waits."""
    if device.type == "cpu":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("way", ["resident", "recomputed", "streamed", "host inputs", "routed"])
def test_a_step_waits_for_the_device_once(device: torch.device, reads: list[int], way: str) -> None:
    """Two micro-batches, pinned as the loop pins them. Two steps before set up the optimizer, cuBLAS and the order of
    copies. fp16 is left out: its GradScaler asks the device whether gradients overflowed.
    """
    model, adapter = random_model(torch.bfloat16)
    if way == "streamed":
        offload.install(model, groups_of(model.blocks, "block"), device=device, ahead=True)
    else:
        model.to(device)
    if way not in ("resident", "routed"):
        inputs = recompute.HostInputs(device, ahead=True) if way == "host inputs" else None
        recompute.install(model.blocks, inputs=inputs)
    trained = stepper(model, adapter, device)
    batches = [global_batch(step, batches=2) for step in range(1, 5)]
    if way == "routed":
        trained = dataclasses.replace(trained, route=Denoiser(model).routed)
        batches = [half_of_the_tokens(batch, model.spec.blocks) for batch in batches]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    for batch in batches[:2]:
        trained(batch, RATE)
    reads.clear()
    with waits(device, "error"):
        for batch in batches[2:]:
            trained(batch, RATE)
    assert reads == [batches[0].size + 1] * 2, "the losses and the gradient norm, at once"


def half_of_the_tokens(whole: GlobalBatch, blocks: int) -> GlobalBatch:
    """TREAD: from the second block to the last but one, half of the image tokens."""
    routes = resolve((TreadRoute(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=-2),), blocks)
    tokens = math.prod(GRID)
    batches = (
        dataclasses.replace(batch, choices=draw_choices(routes, 0, whole.step, batch.slots, tokens))
        for batch in whole.batches
    )
    return dataclasses.replace(whole, batches=tuple(batches))


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32", marks=pytest.mark.slow), pytest.param(torch.bfloat16, id="bf16")],
)
def test_a_compiled_step_is_as_exact_as_an_eager_one(device: torch.device, dtype: torch.dtype) -> None:
    """Blocks compiled by inductor, then recomputed, against the same on the same device without the compiler. A
    rehearsal takes the backend that needs no compiler.
    """
    if device.type == "cuda" and shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("Triton needs a C compiler")
    import torch._dynamo

    torch._dynamo.reset()
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    installed: list[compilation.CompiledBlocks] = []

    def install(model: Flux2Transformer) -> None:
        installed.append(compilation.install(model.blocks, backend=backend))
        recompute.install(model.blocks)

    found = training_results(dtype, device, dtype, install)
    eager = training_results(dtype, device, dtype)
    exact = training_results(torch.float64, torch.device("cpu"), dtype)
    for index in range(2):
        assert_as_exact(found[index], eager[index], exact[index], dtype)
    assert 0 < installed[0].count <= installed[0].bound
    torch._dynamo.reset()
