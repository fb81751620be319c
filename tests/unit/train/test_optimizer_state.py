"""Every optimizer, saved after two steps and put into new objects, goes on as if nothing had happened."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options.optim import OptimOptions
from simpletuner.train import optim, optimizer_state

SHAPES = {"one.a": (4, 1536), "one.b": (64, 4), "two.a": (4, 64), "two.b": (1536, 4)}
"""Above and below the 4096 numbers at which bitsandbytes begins to quantize."""

OF_LIBRARIES = (
    "torch:radam",
    "bitsandbytes:lion8bit",
    "schedulefree:sgdschedulefree",
    "pytorch_optimizer:schedulefreeadamw",
    "pytorch_optimizer:madgrad",
    "pytorch_optimizer:aggmo",
    "pytorch_optimizer:stableadamw",
    "pytorch_optimizer:adan",
)


def start() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value if name.endswith("a") else value * 0) for name, value in made.items()}


def build(
    parameters: Mapping[str, nn.Parameter], name: str, ratio: float = 1.0, factor: float = 1.0
) -> torch.optim.Optimizer:
    options = OptimOptions(optimizer=name, learning_rate=factor * (1.0 if name == "prodigy" else 1e-2))
    return optim.build(optim.lora_plus(parameters.items(), ratio), options, seed=3)


def train(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters.values()):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def written(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})


# normuon orthogonalizes in bf16, which takes 10 s on a CPU.
@pytest.mark.parametrize(
    "name",
    [*OPTIMIZERS, *OF_LIBRARIES, pytest.param("pytorch_optimizer:normuon", marks=pytest.mark.slow)],
)
def test_four_steps_are_two_and_two(name: str) -> None:
    ratio = 1.0 if name == "prodigy" else 4.0
    straight, resumed = start(), start()
    optimizer, before = build(straight, name, ratio), build(resumed, name, ratio)
    train(straight, optimizer, range(4))

    train(resumed, before, range(2))
    tensors, rest = optimizer_state.pack(before, resumed)
    file, text = written(tensors), json.dumps(rest, allow_nan=False)
    fresh = {key: nn.Parameter(value.detach().clone()) for key, value in resumed.items()}
    after = build(fresh, name, ratio)
    optimizer_state.unpack(after, fresh, load(file), json.loads(text))
    train(fresh, after, range(2, 4))

    for key, expected in straight.items():
        assert torch.equal(fresh[key], expected), key
        assert not torch.equal(expected, start()[key]), key
    ours, theirs = optimizer_state.pack(after, fresh), optimizer_state.pack(optimizer, straight)
    assert written(ours[0]) == written(theirs[0])
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "schedulefree:sgdschedulefree"])
def test_a_resumed_run_with_another_rate_goes_on_as_if_the_rate_had_changed_in_its_course(name: str) -> None:
    """The stepper gives each step's rate to the groups."""
    ratio = 1.0 if name == "prodigy" else 4.0
    straight, resumed = start(), start()
    optimizer, before = build(straight, name, ratio), build(resumed, name, ratio)
    train(straight, optimizer, range(2))
    train(resumed, before, range(2))
    tensors, rest = optimizer_state.pack(before, resumed)
    fresh = {key: nn.Parameter(value.detach().clone()) for key, value in resumed.items()}
    after = build(fresh, name, ratio, factor=0.25)
    optimizer_state.unpack(after, fresh, load(written(tensors)), rest)
    for parameters, each in ((straight, optimizer), (fresh, after)):
        for group in each.param_groups:
            group["lr"] = group[optim.RATIO] * (0.25 if name == "prodigy" else 0.25e-2)
        train(parameters, each, range(2, 4))
    train(resumed, before, range(2, 4))
    for key, expected in straight.items():
        assert torch.equal(fresh[key], expected), key
        assert not torch.equal(resumed[key], expected), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_options_do_not_list_the_class_does_not_hide(name: str) -> None:
    """What rules.py accepts for `optimizer_config`, the class takes."""
    known = OPTIMIZERS[name]
    made = build(start(), name)
    takes = type(made).__init__.__annotations__.keys() | set(type(made).__init__.__code__.co_varnames)
    assert known.arguments is not None
    assert set(known.arguments) <= takes


def test_types_and_devices_survive() -> None:
    parameters = start()
    optimizer = build(parameters, "adamw8bit")
    train(parameters, optimizer, range(1))
    tensors, _ = optimizer_state.pack(optimizer, parameters)
    assert tensors["state1/one.a"].dtype == torch.uint8
    assert tensors["state1/one.b"].dtype == torch.float32
    moments = start()
    optimizer = build(moments, "adamw_bf16")
    train(moments, optimizer, range(1))
    tensors, rest = optimizer_state.pack(optimizer, moments)
    fresh = build(moments, "adamw_bf16")
    optimizer_state.unpack(fresh, moments, tensors, rest)
    assert fresh.state[moments["one.a"]]["exp_avg"].dtype == torch.bfloat16


PAGED = ["pagedadamw", "pagedadamw8bit", "pagedlion8bit", "pagedademamix8bit"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", PAGED)
def test_a_paged_optimizer_goes_on_where_nothing_is_paged(name: str) -> None:
    test_four_steps_are_two_and_two(f"bitsandbytes:{name}")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["pagedadamw8bit", "pagedlion", "pagedademamix8bit"])
def test_paged_moments_are_in_the_optimizers_own_buffers_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the optimizer's making: on a GPU they are paged. `tests/gpu` has the rest."""
    before, after = (nn.Parameter(torch.linspace(-1, 1, 8000).reshape(80, 100)) for _ in range(2))
    saved, resumed = (build({"x": parameter}, f"bitsandbytes:{name}") for parameter in (before, after))
    assert isinstance(resumed, optimizer_state.PagedOptimizer)
    train({"x": before}, saved, range(2))
    tensors, rest = optimizer_state.pack(saved, {"x": before})
    make, made = resumed.get_state_buffer, []

    def noted(p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        made.append(make(p, dtype))
        return made[-1]

    monkeypatch.setattr(resumed, "get_state_buffer", noted)
    optimizer_state.unpack(resumed, {"x": after}, tensors, rest)
    moments = {key: value for key, value in resumed.state[after].items() if key in ("state1", "state2")}
    assert len(moments) == len(made) == (1 if "lion" in name else 2)
    for key, value in moments.items():
        expected = saved.state[before][key]
        assert torch.equal(value, expected)
        assert value.is_contiguous()
        assert any(value is buffer for buffer in made)


def test_an_optimizer_that_is_not_paged_makes_no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = start()
    optimizer = build(parameters, "adamw8bit")
    train(parameters, optimizer, range(1))
    fresh = build(parameters, "adamw8bit")
    monkeypatch.setattr(fresh, "get_state_buffer", pytest.fail)
    optimizer_state.unpack(fresh, parameters, *optimizer_state.pack(optimizer, parameters))


class Odd(torch.optim.SGD):
    """Keeps what an optimizer may keep."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] |= {
                "list": [parameter.detach() + 1, None, 2],
                "pair": (1.5, float("inf")),
                "table": {0: parameter.detach() * 2, "kind": torch.bfloat16},
            }


def test_nested_state_and_numbers_that_json_has_not() -> None:
    parameters = {"x": nn.Parameter(torch.ones(3))}
    optimizer = Odd(parameters.values(), lr=0.1)
    optimizer.step()
    tensors, rest = optimizer_state.pack(optimizer, parameters)
    assert set(tensors) == {"list.0/x", "table.0/x"}
    fresh = Odd(parameters.values(), lr=0.1)
    optimizer_state.unpack(fresh, parameters, tensors, json.loads(json.dumps(rest, allow_nan=False)))
    found = fresh.state[parameters["x"]]
    assert torch.equal(found["list"][0], torch.full((3,), 2.0))
    assert found["list"][1:] == [None, 2]
    assert found["pair"] == (1.5, float("inf"))
    assert torch.equal(found["table"][0], torch.full((3,), 2.0))
    assert found["table"]["kind"] is torch.bfloat16


def test_what_cannot_be_saved_is_not_left_out_in_silence() -> None:
    parameters = {"x": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    optimizer.state[parameters["x"]]["odd"] = {1, 2}
    with pytest.raises(TypeError, match="odd/x is a set"):
        optimizer_state.pack(optimizer, parameters)


def test_another_optimizers_state_is_refused() -> None:
    parameters = start()
    tensors, rest = optimizer_state.pack(build(parameters, "adamw"), parameters)
    with pytest.raises(ValueError, match="the saved optimizer lacks the settings"):
        optimizer_state.unpack(build(parameters, "adamw_schedulefree"), parameters, tensors, rest)
    with pytest.raises(ValueError, match="2"):
        optimizer_state.unpack(build(parameters, "adamw", 2.0), parameters, tensors, rest)
