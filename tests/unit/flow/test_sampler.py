"""Samplers on fields whose paths are known."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from simpletuner.flow.rollout import SOLVERS
from simpletuner.flow.sampler import Velocity, euler

SHAPE = (3, 4, 2, 2)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grid(source: list[float], target: list[float], steps: int) -> Tensor:
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
    return torch.lerp(torch.tensor(source, dtype=torch.float64), torch.tensor(target, dtype=torch.float64), share)


def wide(sigma: Tensor) -> Tensor:
    return sigma.reshape(-1, 1, 1, 1)


DATA, NOISE = normal(0), normal(1)
SOURCE, TARGET = [0.9, 0.6, 0.35], [0.2, 0.1, 0.3]


def to_a_point(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity where the data are one point (another one for each sample)."""
    return (x - DATA.to(x.dtype)) / wide(sigma)


MEAN, VARIANCE = 0.7, 0.3


def variance(sigma: Tensor) -> Tensor:
    return (1 - sigma) ** 2 * VARIANCE + sigma**2


def to_a_gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity where each element of the data is normal: the mean of noise − data at x."""
    sigma = wide(sigma)
    slope = (sigma - (1 - sigma) * VARIANCE) / variance(sigma)
    return slope * (x - (1 - sigma) * MEAN) - MEAN


def along_a_gaussian(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Where that velocity leads, exactly: as many standard deviations from the mean as before."""
    source, target = wide(source), wide(target)
    ratio = (variance(target) / variance(source)).sqrt()
    return (1 - target) * MEAN + ratio * (x - (1 - source) * MEAN)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("source", [SOURCE, [1.0, 1.0, 1.0]])
def test_every_solver_stays_on_a_straight_path(name: str, steps: int, source: list[float]) -> None:
    start = (1 - wide(torch.tensor(source))) * DATA + wide(torch.tensor(source)) * NOISE
    found = SOLVERS[name].integrate(to_a_point, start.double(), grid(source, TARGET, steps))
    share = wide(torch.tensor(TARGET, dtype=torch.float64))
    torch.testing.assert_close(found, (1 - share) * DATA + share * NOISE, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "dpm", "unipc"])
def test_they_reach_the_data(name: str) -> None:
    found = SOLVERS[name].integrate(to_a_point, NOISE, grid([1.0] * 3, [0.0] * 3, 5))
    torch.testing.assert_close(found, DATA)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm", 2), ("unipc", 2)])
def test_every_solver_has_its_own_order_on_curved_paths(name: str, order: int) -> None:
    """The slope of log(error) over log(step). UniPC's corrector makes every point but the last one better than 2."""
    exact = along_a_gaussian(NOISE, torch.tensor(SOURCE).double(), torch.tensor(TARGET).double())
    counts = [16, 32, 64, 128]
    errors = [
        (SOLVERS[name].integrate(to_a_gaussian, NOISE, grid(SOURCE, TARGET, steps)) - exact).abs().max().item()
        for steps in counts
    ]
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    average = sum(slopes) / len(slopes)
    if name == "unipc":
        assert average > 1.9, slopes
    else:
        assert average == pytest.approx(order, abs=0.15), slopes


def test_a_second_order_solver_is_better_at_the_same_number_of_calls() -> None:
    exact = along_a_gaussian(NOISE, torch.tensor(SOURCE).double(), torch.tensor(TARGET).double())
    errors = {
        name: (
            solver.integrate(to_a_gaussian, NOISE, grid(SOURCE, TARGET, 8 // solver.calls_per_step)) - exact
        ).abs().max().item()
        for name, solver in SOLVERS.items()
    }  # fmt: skip
    assert max(errors["heun"], errors["dpm"], errors["unipc"]) < errors["euler"] / 2, errors


def counted(velocity: Velocity) -> tuple[Velocity, Callable[[], int]]:
    calls: list[Tensor] = []

    def asked(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        return velocity(x, sigma)

    return asked, lambda: len(calls)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_calls_a_step_are_those_that_are_told(name: str, steps: int) -> None:
    asked, calls = counted(to_a_gaussian)
    SOLVERS[name].integrate(asked, NOISE, grid(SOURCE, TARGET, steps))
    assert calls() == steps * SOLVERS[name].calls_per_step


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_do_not_meet(name: str) -> None:
    """Each sample of a batch goes the way it goes alone."""
    integrate = SOLVERS[name].integrate
    together = integrate(to_a_gaussian, NOISE, grid(SOURCE, TARGET, 3))
    for index in range(3):
        alone = integrate(to_a_gaussian, NOISE[index : index + 1], grid(SOURCE, TARGET, 3)[:, index : index + 1])
        assert torch.equal(alone[0], together[index])


def test_no_two_solvers_are_the_same_one() -> None:
    found = [solver.integrate(to_a_gaussian, NOISE, grid(SOURCE, TARGET, 3)) for solver in SOLVERS.values()]
    assert not any(torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_euler_is_exact_on_a_straight_path_and_tells_its_steps() -> None:
    steps: list[int] = []
    sigmas = torch.tensor([[1.0], [0.7], [0.2], [0.0]], dtype=torch.float64).expand(4, 3)
    out = euler(lambda x, sigma: (NOISE - DATA).float(), NOISE.float(), sigmas, steps.append)
    torch.testing.assert_close(out, DATA.float(), rtol=1e-5, atol=1e-5)
    assert steps == [1, 2, 3]


def test_the_model_is_asked_in_the_states_type_and_its_answer_is_taken_into_it() -> None:
    asked: list[tuple[torch.dtype, torch.dtype]] = []

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((x.dtype, sigma.dtype))
        return x.bfloat16()

    for solver in SOLVERS.values():
        assert solver.integrate(half, NOISE.float(), grid(SOURCE, TARGET, 2)).dtype == torch.float32
    assert set(asked) == {(torch.float32, torch.float32)}
