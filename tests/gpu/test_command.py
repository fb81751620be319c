"""`simpletuner train --example tiny-lora` on the device: killed, resumed, sampled from."""

import signal
from pathlib import Path

import pytest
import torch
from command_runs import run_command
from PIL import Image
from safetensors.torch import load_file

from simpletuner.runs.events import read_events

pytestmark = pytest.mark.usefixtures("_libraries_of_a_whole_run")

STEPS, SAVED_EVERY = 8, 4
FLAGS = (
    "--example=tiny-lora",
    f"--max_train_steps={STEPS}",
    f"--checkpoint_step_interval={SAVED_EVERY}",
    "--lr_warmup_steps=0",
    "--validation_disable",
    "--eval_steps_interval=100",
)
KILLED_AT = f"step:{SAVED_EVERY + 2}"

TOLERANCE = 0.05
"""Of the norm of what was learned. Where attention's backward pass adds up in an order that changes, gradients agree to
bf16's rounding, 0.4 %. Adam divides each by its own size: those of numbers near zero may change their sign, and do so
for the few steps after the kill."""


@pytest.fixture(scope="module")
def _libraries_of_a_whole_run() -> None:
    pytest.importorskip("diffusers", reason="a whole run needs diffusers' autoencoder")
    pytest.importorskip("transformers", reason="a whole run needs transformers")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the finished runs `whole` and `resumed`, the second of which was killed on its way."""
    folder = tmp_path_factory.mktemp("command")
    whole, resumed = (("train", *FLAGS, f"--output_dir=output/{name}") for name in ("whole", "resumed"))
    done = run_command(folder, *whole)
    assert done.returncode == 0, done.stderr[-4000:]
    killed = run_command(folder, *resumed, kill_at=KILLED_AT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    done = run_command(folder, *resumed)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def events_of(folder: Path, run: str, kind: str) -> list[dict[str, object]]:
    return [event for event in read_events(folder / "output" / run / "events.jsonl") if event["type"] == kind]


def losses(folder: Path, run: str) -> list[float]:
    """The loss of each step, of its last attempt."""
    found = {event["step"]: event["loss"] for event in events_of(folder, run, "step")}
    return [float(str(found[step])) for step in range(1, STEPS + 1)]


def learned(folder: Path, run: str) -> dict[str, torch.Tensor]:
    """The B matrices, which begin at zero: B is what was learned."""
    tensors = load_file(folder / "output" / run / "pytorch_lora_weights.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items() if "lora_B" in name}


def test_killed_and_resumed_it_ends_the_same(device: torch.device, workplace: Path) -> None:
    """To `TOLERANCE` on a GPU; on a CPU, and with deterministic kernels, to the bit."""
    assert [event["resumed_from"] for event in events_of(workplace, "resumed", "run")] == [None, SAVED_EVERY]
    expected, found = learned(workplace, "whole"), learned(workplace, "resumed")
    norm = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    apart = torch.stack([(found[name] - tensor).norm() for name, tensor in expected.items()]).norm()
    tolerance = 0.0 if device.type == "cpu" else TOLERANCE
    assert norm > 0
    assert apart <= tolerance * norm
    assert losses(workplace, "resumed") == pytest.approx(losses(workplace, "whole"), rel=max(tolerance, 1e-12))


def test_sample_draws_what_was_learned(workplace: Path) -> None:
    flags = ("--prompt", "a flag", "--width=64", "--height=64", "--steps=4")
    done = run_command(workplace, "sample", "--run", "output/resumed", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    with Image.open(workplace / done.stdout.strip().splitlines()[-1]) as picture:
        assert picture.size == (64, 64)
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 20, "not one gray"


@pytest.mark.slow
def test_with_deterministic_kernels_the_bits_are_equal(tmp_path: Path) -> None:
    for name, kill_at in (("whole", None), ("resumed", KILLED_AT), ("resumed", None)):
        flags = ("train", *FLAGS, f"--output_dir=output/{name}")
        done = run_command(tmp_path, *flags, kill_at=kill_at, deterministic=True)
        assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr[-4000:]
    expected, found = learned(tmp_path, "whole"), learned(tmp_path, "resumed")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")
