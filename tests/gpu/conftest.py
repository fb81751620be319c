"""Tests of what only a CUDA GPU shows.

    pytest tests/gpu                    the quick ones: about three minutes on an H100, by estimate
    pytest tests/gpu -m slow            500 steps of each way of offloading, whole runs, peak memory of each phase
    PYTEST_SIMPLETUNER_DEVICE=cpu pytest tests/gpu      a rehearsal: the same tests on the CPU, as far as they mean
                                        something there. What is asked of streams, kernels and memory is skipped.

Without a GPU all are skipped. They need pytest, torch, einops, jaxtyping, pydantic, safetensors, tokenizers, numpy,
pillow and tqdm. Those of the text encoder and of whole runs want transformers, those of the autoencoder and of whole
runs want diffusers, those of an optimizer want its library: each is skipped where that is missing.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from rehearsal import IS_REHEARSAL

# Read by CUDA's and the CPU's libraries when they start. Without the first, `use_deterministic_algorithms` is refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if IS_REHEARSAL:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip before any fixture, all tests for one reason."""
    if not IS_REHEARSAL and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU as a run chooses it, without TF32; in a rehearsal the CPU."""
    from simpletuner.memory.device import choose_device

    return torch.device("cpu") if IS_REHEARSAL else choose_device()


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU; skips a rehearsal."""
    if device.type == "cpu":
        pytest.skip("a CPU has none of this")
    return device


@pytest.fixture(autouse=True)
def _clean_device(device: torch.device) -> Iterator[None]:
    """After each test its tensors are gone."""
    yield
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """Two equal computations give equal bits.

    By default they need not on a GPU: the backward passes of flash, memory-efficient and cuDNN attention add up in an
    order that changes from run to run. Here attention is the plain one, and every kernel that adds in such an order is
    replaced, or is an error. As a by-product, torch fills memory that nothing has written yet with NaN.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded FLUX.2 as a diffusers folder. Read only."""
    pytest.importorskip("transformers", reason="the text encoder and its tokenizer need transformers")
    from simpletuner.flux2.tiny import make

    return make(tmp_path_factory.mktemp("embedded") / "tiny-flux2")


@pytest.fixture(scope="session")
def source(embedded_model: Path) -> "Source":
    """Every file of the embedded model."""
    from simpletuner.config.options.model import ModelOptions
    from simpletuner.flux2.source import locate

    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(embedded_model))
    return locate(options, report=print)
