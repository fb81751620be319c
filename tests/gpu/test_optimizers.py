"""Every installed optimizer, saved after two steps on the device and put into new objects, goes on as before."""

import json
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from simpletuner.config.optimizers import OPTIMIZERS, known_optimizer
from simpletuner.config.options.optim import OptimOptions
from simpletuner.train import optim, optimizer_state

PAGED = tuple(f"bitsandbytes:paged{name}" for name in ("adamw", "adamw8bit", "lion8bit", "ademamix8bit"))
"""Their states are in memory that the GPU's driver moves; see `SHAPES`."""
OF_LIBRARIES = (
    "torch:radam",
    "torch:nadam",
    "bitsandbytes:lion8bit",
    "bitsandbytes:ademamix8bit",
    *PAGED,
    "schedulefree:sgdschedulefree",
    "pytorch_optimizer:adan",
    "pytorch_optimizer:soap",
    "pytorch_optimizer:stableadamw",
)
SHAPES = {"one.a": (4, 1536), "one.b": (64, 4), "two.a": (64, 2048), "two.b": (1536, 4)}
"""bitsandbytes keeps less than 4096 numbers in fp32, and pages no state of less than 100,000."""


def fresh(values: Mapping[str, Tensor], device: torch.device) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.detach().to(device, copy=True)) for name, value in values.items()}


def start() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: value if name.endswith("a") else value * 0 for name, value in made.items()}


def build(parameters: Mapping[str, nn.Parameter], name: str) -> torch.optim.Optimizer:
    is_prodigy = name == "prodigy"
    options = OptimOptions(optimizer=name, learning_rate=1.0 if is_prodigy else 1e-2)
    return optim.build(optim.lora_plus(parameters.items(), 1.0 if is_prodigy else 4.0), options, seed=3)


def take_steps(parameters: Mapping[str, nn.Parameter], made: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters.values()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        made.step()


def written(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def places(made: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[object, ...]]:
    """Device and type of each tensor of the state, and whether it is in paged memory."""
    return {
        f"{entry}/{name}": (value.device, value.dtype, getattr(value, "is_paged", False))
        for name, parameter in parameters.items()
        for entry, value in made.state[parameter].items()
        if isinstance(value, Tensor)
    }


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OF_LIBRARIES])
def test_four_steps_are_two_and_two(device: torch.device, name: str) -> None:
    library = known_optimizer(name).library
    if not known_optimizer(name).is_installed:
        pytest.skip(f"{library} is not installed")
    if name in PAGED and device.type == "cpu":
        pytest.skip("a CPU has no paged memory")
    straight, resumed = fresh(start(), device), fresh(start(), device)
    made, before = build(straight, name), build(resumed, name)
    take_steps(straight, made, range(4))

    take_steps(resumed, before, range(2))
    tensors, rest = optimizer_state.pack(before, resumed)
    file, text = written(tensors), json.dumps(rest, allow_nan=False)
    again = fresh(resumed, device)
    after = build(again, name)
    optimizer_state.unpack(after, again, load(file), json.loads(text))
    take_steps(again, after, range(2, 4))

    for key, expected in straight.items():
        assert torch.equal(again[key], expected), key
        assert not torch.equal(expected.cpu(), start()[key]), key
    ours, theirs = optimizer_state.pack(after, again), optimizer_state.pack(made, straight)
    assert written(ours[0]) == written(theirs[0])
    assert ours[1] == theirs[1]
    assert places(after, again) == places(made, straight)
    if name in PAGED:
        assert any(is_paged for _, _, is_paged in places(after, again).values())
