"""Streamed weights and block inputs on the host: the resident run's bits, however late copies and kernels start."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch._dynamo
from delays import Delays, ignore_all_waits
from rehearsal import IS_REHEARSAL
from tiny_training import (
    WITHOUT_LIBRARY,
    Level,
    Trained,
    assert_same_bits,
    groups_of,
    random_model,
    stepper,
    train,
)

from simpletuner.base.errors import DataError
from simpletuner.config.options.precision import PrecisionName
from simpletuner.flux2.source import Source
from simpletuner.memory import compile as compilation
from simpletuner.memory import offload, recompute
from simpletuner.train.step import Stepper

HERE = Path(__file__).parent
QUICK_STEPS, SOAK_STEPS = 8, 20 if IS_REHEARSAL else 500

pytestmark = pytest.mark.usefixtures("_deterministic")


@dataclass(frozen=True)
class Residency:
    """Where the frozen weights of the blocks are, and the inputs of recomputed blocks."""

    level: Level | None = None
    ahead: bool = False
    on_disk: bool = False
    has_host_inputs: bool = False
    every: int = 1
    """Which blocks are streamed: 2 leaves every second one on the device."""


WAYS = {
    "blocks": Residency("block"),
    "blocks, stream": Residency("block", ahead=True),
    "leaves, stream": Residency("leaf", ahead=True),
    "blocks from disk": Residency("block", on_disk=True),
    "leaves from disk, stream": Residency("leaf", ahead=True, on_disk=True),
    "host inputs": Residency(has_host_inputs=True),
    "host inputs, stream": Residency(has_host_inputs=True, ahead=True),
    "all": Residency("block", ahead=True, has_host_inputs=True),
    "half of the blocks, stream": Residency("block", ahead=True, every=2),
}
PRECISIONS: tuple[PrecisionName, ...] = ("no_change", *WITHOUT_LIBRARY)


def prepared(
    precision: PrecisionName,
    device: torch.device,
    way: Residency | None,
    folder: Path,
    delays: Delays | None = None,
    backend: str | None = None,
) -> tuple[Stepper, offload.Streaming | None]:
    """The step of a bf16 model on `device`: held as `way` says and recomputed, or, without one, just there. Blocks are
    compiled if a `backend` is given; compiled code has no room for delays between kernels.
    """
    model, adapter = random_model(torch.bfloat16, precision)
    if backend is not None:
        compilation.install(model.blocks, backend=backend, sizes_vary=False)
    elif delays is not None:
        delays.between_kernels(model)
    streaming = None
    if way is not None and way.level is not None:
        groups = groups_of(model.blocks[:: way.every], way.level)
        where = folder if way.on_disk else None
        streaming = offload.install(model, groups, device=device, ahead=way.ahead, folder=where)
    else:
        model.to(device)
    if way is not None:
        inputs = recompute.HostInputs(device, ahead=way.ahead) if way.has_host_inputs else None
        recompute.install(model.blocks, inputs=inputs)
    return stepper(model, adapter, device), streaming


@pytest.fixture(scope="module")
def resident() -> dict[tuple[str, int], Trained]:
    """What a resident model does, by precision and number of steps: trained once for all ways."""
    return {}


def resident_run(
    resident: dict[tuple[str, int], Trained], precision: PrecisionName, device: torch.device, steps: int
) -> Trained:
    if (precision, steps) not in resident:
        trained, _ = prepared(precision, device, None, Path())
        resident[precision, steps] = train(trained, steps)
    return resident[precision, steps]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twice_the_same_is_the_same(device: torch.device, precision: PrecisionName) -> None:
    """Else nothing that follows would mean anything."""
    runs = [train(prepared(precision, device, None, Path())[0], QUICK_STEPS) for _ in range(2)]
    assert_same_bits(*runs)
    assert len(set(runs[0][0])) == QUICK_STEPS


CASES = [(precision, way, QUICK_STEPS) for precision in PRECISIONS for way in WAYS]
SOAK_CASES = [("no_change", way, SOAK_STEPS) for way in WAYS]
SOAK_CASES += [(precision, way, SOAK_STEPS) for precision in WITHOUT_LIBRARY for way in ("all", "leaves, stream")]


@pytest.mark.parametrize(
    ("precision", "way", "steps"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SOAK_CASES)]
)
def test_a_run_has_the_resident_ones_bits(
    device: torch.device,
    resident: dict[tuple[str, int], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: PrecisionName,
    way: str,
    steps: int,
) -> None:
    expected = resident_run(resident, precision, device, steps)
    delays = Delays(monkeypatch, device, seed=steps)
    trained, streaming = prepared(precision, device, WAYS[way], tmp_path, delays)
    found = train(trained, steps)
    assert_same_bits(found, expected)
    assert delays.count > 50 * steps
    if streaming is not None:
        assert streaming.copies > steps
        assert (streaming.prefetched_copies > 0) == WAYS[way].ahead


@pytest.mark.slow
def test_compiled_and_streamed_it_has_the_compiled_resident_ones_bits(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    found = []
    for way in (Residency(), WAYS["all"]):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            trained, _ = prepared("no_change", device, way, tmp_path, Delays(patch, device), backend)
            found.append(train(trained, SOAK_STEPS))
    torch._dynamo.reset()
    assert_same_bits(*found)


@pytest.mark.parametrize("way", ["blocks, stream", "leaves, stream", "host inputs, stream"])
def test_the_delays_find_a_missing_wait(
    cuda: torch.device,
    resident: dict[tuple[str, int], Trained],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    """The test of the test: where no stream waits for another, bits differ, or a number is none."""
    expected = resident_run(resident, "no_change", cuda, QUICK_STEPS)
    delays = Delays(monkeypatch, cuda)
    trained, _ = prepared("no_change", cuda, WAYS[way], tmp_path, delays)
    ignore_all_waits(monkeypatch)
    try:
        found = train(trained, QUICK_STEPS)
    except DataError:
        return
    finally:
        torch.cuda.synchronize()
    with pytest.raises(AssertionError):
        assert_same_bits(found, expected)


def test_a_streamed_text_encoder_gives_the_resident_ones_bits(
    device: torch.device, source: Source, tmp_path: Path
) -> None:
    from simpletuner.flux2.load import load_text_encoder, stream_text_encoder

    prompts = ["a red square on a blue ground", "a flag", ""]
    resident = load_text_encoder(source, torch.bfloat16, device, fix_regex=True).encode(prompts)
    streamed = stream_text_encoder(source, torch.bfloat16, device, folder=tmp_path, fix_regex=True).encode(prompts)
    for ours, theirs in zip(streamed, resident, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.index, theirs.index)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_streamed_autoencoder_gives_the_resident_ones_bits(
    device: torch.device, source: Source, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    pytest.importorskip("diffusers", reason="the autoencoder is diffusers'")
    from simpletuner.flux2.load import load_autoencoder

    pixels = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    resident = load_autoencoder(source, torch.bfloat16, device)
    delays = Delays(monkeypatch, device)
    streamed = load_autoencoder(source, torch.bfloat16, device, is_streamed=True, ahead=ahead)
    for _ in range(3):  # the order of copies is learned in the first
        latents = resident.encode(pixels)
        assert torch.equal(streamed.encode(pixels), latents)
        assert torch.equal(streamed.decode(latents), resident.decode(latents))
    assert delays.count > 0


def sanitized(way: str, *flags: str, device: torch.device) -> subprocess.CompletedProcess[str]:
    """A few steps in a process of its own, in which torch follows which stream reads and writes which memory."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if device.type == "cuda":
        environment["TORCH_CUDA_SANITIZER"] = "1"
    command = [sys.executable, str(HERE / "sanitized.py"), way, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("way", [pytest.param("leaves, stream", marks=pytest.mark.slow), "all"])
def test_the_sanitizer_finds_no_race(device: torch.device, way: str) -> None:
    done = sanitized(way, device=device)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "CSAN" not in done.stderr


def test_the_sanitizer_finds_a_missing_wait(cuda: torch.device) -> None:
    done = sanitized("all", "--without-waits", device=cuda)
    assert done.returncode != 0
    assert "CSAN" in done.stderr, done.stderr[-4000:]
