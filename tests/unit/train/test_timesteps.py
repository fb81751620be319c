"""The density of sigma that options describe, with a set's own offset."""

import math

import pytest

from simpletuner.config.options.schedule import ScheduleOptions
from simpletuner.flow.sigma import normal_quantile
from simpletuner.train.timesteps import Timesteps

LEVELS = (0.001, 0.1, 0.5, 0.77, 0.999)


@pytest.mark.parametrize("options", [{}, {"flow_schedule_auto_shift": True}, {"flow_use_beta_schedule": True}])
def test_an_offset_of_zero_changes_no_bit(options: dict[str, bool]) -> None:
    own = Timesteps.of(ScheduleOptions.model_validate(options))
    for u in LEVELS:
        assert own.sigma(u, 1024, 0.0) == own.sigma(u, 1024)


@pytest.mark.parametrize("offset", [-2.0, 0.5, 10.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_offset_is_added_to_the_normal_draw(offset: float, scale: float) -> None:
    own = Timesteps.of(ScheduleOptions(flow_sigmoid_scale=scale, flow_schedule_shift=2.5))
    for u in LEVELS:
        plain = 1 / (1 + math.exp(-scale * (normal_quantile(u) + offset)))
        expected = 2.5 * plain / (1 + 1.5 * plain)
        assert own.sigma(u, 1024, offset) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"flow_use_uniform_schedule": True}, {"flow_use_beta_schedule": True}, {"flow_custom_timesteps": "500"}]
)
def test_other_densities_take_no_offset(options: dict[str, object]) -> None:
    own = Timesteps.of(ScheduleOptions.model_validate(options))
    assert [own.sigma(u, 1024, 3.0) for u in LEVELS] == [own.sigma(u, 1024) for u in LEVELS]
