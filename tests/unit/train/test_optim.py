import math

import pytest
import torch

from simpletuner.base.errors import ConfigError
from simpletuner.config.options.optim import OptimOptions
from simpletuner.train import optim


def rates(steps: int = 10, **options: object) -> list[float]:
    chosen = OptimOptions(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [optim.learning_rate(chosen, step, steps) for step in range(1, steps + 1)]


def test_constant_has_no_warm_up() -> None:
    assert rates(lr_scheduler="constant", lr_warmup_steps=5) == [1.0] * 10


def test_warm_up_rises_evenly_to_the_whole_rate_and_stays() -> None:
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == [0.25, 0.5, 0.75] + [1.0] * 7


@pytest.mark.parametrize(
    ("scheduler", "shape"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("polynomial", lambda p: (1 - p) ** 0.8),
        ("sine", lambda p: math.sin(math.pi * p)),
    ],
)
def test_the_shape_covers_what_is_left_after_the_warm_up(scheduler: str, shape) -> None:  # type: ignore[no-untyped-def]
    found = rates(steps=12, lr_scheduler=scheduler, lr_warmup_steps=2)
    assert found[:2] == [0.5, 1.0]
    assert found[2:] == pytest.approx([shape(step / 10) for step in range(10)])


def test_restarts_return_to_the_top() -> None:
    found = rates(lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert found[0] == found[5] == 1.0
    assert found[:5] == pytest.approx(found[5:])


def test_a_falling_schedule_ends_near_lr_end() -> None:
    found = rates(steps=1000, lr_scheduler="cosine", lr_end=0.25)
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(0.25, abs=1e-4)
    assert min(found) >= 0.25


def test_every_schedule_of_the_options_is_there() -> None:
    names = OptimOptions.model_fields["lr_scheduler"].annotation.__args__  # type: ignore[union-attr]
    assert set(optim.SCHEDULES) == set(names)
    assert set(optim.OPTIMISERS) == set(OptimOptions.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]


def test_an_argument_the_optimiser_does_not_know_is_the_users_error() -> None:
    with pytest.raises(ConfigError, match="optimizer_config"):
        optim.build([torch.nn.Parameter(torch.zeros(1))], OptimOptions(optimizer_config={"momentum": 0.9}))


def test_the_optimisers_own_arguments_win() -> None:
    optimiser = optim.build([torch.nn.Parameter(torch.zeros(1))], OptimOptions(optimizer_config={"weight_decay": 0.5}))
    assert optimiser.param_groups[0]["weight_decay"] == 0.5
    assert optimiser.param_groups[0]["betas"] == (0.9, 0.999)


def parameters(*gradients: float) -> list[torch.nn.Parameter]:
    found = []
    for value in gradients:
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([value])
        found.append(parameter)
    return found


def gradients_of(found: list[torch.nn.Parameter]) -> list[float]:
    return [parameter.grad.item() for parameter in found if parameter.grad is not None]


def test_the_norm_is_over_all_parameters_and_told_before_clipping() -> None:
    found = parameters(3.0, 4.0)
    assert optim.clip(found, OptimOptions(max_grad_norm=1.0)).item() == pytest.approx(5.0)
    assert gradients_of(found) == pytest.approx([0.6, 0.8])


def test_a_small_gradient_keeps_its_bits() -> None:
    found = parameters(0.3, 0.4)
    optim.clip(found, OptimOptions(max_grad_norm=1.0))
    assert gradients_of(found) == [torch.tensor(0.3).item(), torch.tensor(0.4).item()]


def test_zero_clips_nothing_and_value_clips_each() -> None:
    found = parameters(30.0, -40.0)
    assert optim.clip(found, OptimOptions(max_grad_norm=0.0)).item() == pytest.approx(50.0)
    assert gradients_of(found) == [30.0, -40.0]
    optim.clip(found, OptimOptions(max_grad_norm=1.0, grad_clip_method="value"))
    assert gradients_of(found) == [1.0, -1.0]
