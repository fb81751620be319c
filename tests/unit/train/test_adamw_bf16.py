"""AdamW with bf16 memory: unbiased where rounding to the nearest stands still."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.base.draws import draw_seed
from simpletuner.memory.trace import Ledger
from simpletuner.train.adamw_bf16 import CPU_CHUNK, ELEMENT_BYTES, AdamWBf16, noise_bits, stochastically_rounded

CPU = torch.device("cpu")


def one_tensor(
    parameter: Tensor, first: Tensor, second: Tensor, gradient: Tensor, *, step: int, place: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A step at torch's defaults, one tensor at a time and as the formulas are written."""
    lr, beta1, beta2, eps, decay = 1e-3, 0.9, 0.999, 1e-8, 0.01
    gradient = gradient.float()
    first = first.float().lerp(gradient, 1 - beta1)
    second = second.float().mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
    root = second.sqrt().div(math.sqrt(1 - beta2**step)).add(eps)
    updated = parameter.float().mul(1 - lr * decay).addcdiv(first, root, value=-lr / (1 - beta1**step))
    bits = noise_bits([(draw_seed(seed, "rounding", step, place), 0, parameter.numel())], CPU).view_as(parameter)
    exact = parameter.dtype == torch.float32
    return (
        updated if exact else stochastically_rounded(updated, bits >> 32),
        stochastically_rounded(first, bits),
        stochastically_rounded(second, bits >> 16),
    )


SHAPES = [(3, 5), (1,), (0,), (), (CPU_CHUNK + 17,), (7, 13, 3), (300, 700), (64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    parameters.append(nn.Parameter(torch.randn(40, 30).to(dtype)[:, 3:25]))  # not contiguous
    parameters.append(nn.Parameter(torch.randn(40, 30).to(dtype).t()))
    expected = [
        (each.detach().clone(), *(torch.zeros(each.shape, dtype=torch.bfloat16) for _ in range(2)))
        for each in parameters
    ]
    taken = [0] * len(parameters)
    optimizer = AdamWBf16([{"params": parameters[:4]}, {"params": parameters[4:]}], seed=7)
    for step in range(4):
        for place, parameter in enumerate(parameters):
            parameter.grad = None
            if (step, place) != (2, 5):  # left out once: from then on its steps are others
                parameter.grad = torch.randn(parameter.shape).to(dtype)
                taken[place] += 1
                expected[place] = one_tensor(*expected[place], parameter.grad, step=taken[place], place=place, seed=7)
        optimizer.step()
    for count, parameter, (value, first, second) in zip(taken, parameters, expected, strict=True):
        state = optimizer.state[parameter]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == count
        assert torch.equal(parameter, value)
        assert torch.equal(state["exp_avg"], first)
        assert torch.equal(state["exp_avg_sq"], second)


class Launches(TorchDispatchMode):
    """Counts operators that are no views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def stepped(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> AdamWBf16:
    """An optimizer after its first step, which makes the state."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = AdamWBf16(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_operators_do_not_grow_with_tensors() -> None:
    counts = []
    for tensors in (1, 200):
        optimizer = stepped([(8, 16)] * tensors)
        with Launches() as launches:
            optimizer.step()
        counts.append(launches.count)
    assert counts[0] == counts[1] <= 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporary_memory_does_not_grow_with_tensors(dtype: torch.dtype) -> None:
    for shapes in ([(5 * CPU_CHUNK,)], [(CPU_CHUNK // 8,)] * 40):
        optimizer = stepped(shapes, dtype)
        known = []
        for parameter, state in optimizer.state.items():
            known += [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        with Ledger(known) as ledger:
            optimizer.step()
        assert 0.75 * ELEMENT_BYTES * CPU_CHUNK < ledger.peak <= ELEMENT_BYTES * CPU_CHUNK


def test_what_bf16_holds_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.0e38, float("inf")]).to(torch.bfloat16)
    assert torch.equal(
        stochastically_rounded(exact.float(), noise_bits([(5, 0, len(exact))], CPU)).view(torch.int16),
        exact.view(torch.int16),
    )


def test_rounding_is_up_or_down_in_proportion() -> None:
    value = torch.full((200_000,), 1 + 2**-7 * 0.25)  # a quarter of the way from 1 to the next number
    for values in (value, -value):
        found = stochastically_rounded(values, noise_bits([(1, 0, len(values))], CPU)).float()
        assert set(found.abs().tolist()) == {1.0, 1 + 2**-7}
        assert found.mean().item() == pytest.approx(values[0].item(), abs=2**-7 * 0.004)


def test_the_draw_is_splitmix64s() -> None:
    """The first outputs of the published generator for the seed 1234567."""
    found = noise_bits([(1234567, 0, 3)], CPU).tolist()
    assert [value % 2**64 for value in found] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_second_moment_moves_where_the_nearest_number_would_hold_it() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([parameter], lr=0.0)
    parameter.grad = torch.ones(4096)
    optimizer.step()
    optimizer.state[parameter]["exp_avg_sq"].fill_(2.0)  # far above what the gradients give
    nearest = optimizer.state[parameter]["exp_avg_sq"].clone()
    for _ in range(200):
        optimizer.step()
        nearest = (nearest.float() * 0.999 + 0.001).to(torch.bfloat16)
    expected = 1 + 0.999**200
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.005)
    assert nearest[0].item() == 2.0


def test_it_learns_as_adamw_does() -> None:
    """To 2 %: a moment in bf16 is right to 1/256, and errors average out."""
    ours, theirs = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64))
    optimizers = AdamWBf16([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for step in range(50):
        gradient = torch.sin(torch.arange(4096.0) + step).view(64, 64) + 0.5
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


def test_bf16_parameters_move_by_less_than_their_last_place() -> None:
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = AdamWBf16([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert parameter.float().mean().item() == pytest.approx(1 - 50 * 1e-4, abs=3e-4)


def test_tensors_steps_and_seeds_have_draws_of_their_own() -> None:
    def moments(seed: int) -> list[torch.Tensor]:
        parameters = [nn.Parameter(torch.zeros(4096)) for _ in range(2)]
        optimizer = AdamWBf16(parameters, seed=seed)
        for parameter in parameters:
            parameter.grad = torch.full((4096,), 0.3)
        optimizer.step()
        return [optimizer.state[parameter]["exp_avg"] for parameter in parameters]

    one, two = moments(0)
    assert not torch.equal(one, two)
    assert torch.equal(one, moments(0)[0])
    assert not torch.equal(one, moments(1)[0])
