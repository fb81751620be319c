"""The multistep solvers against diffusers' schedulers of that name."""

from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.flow.rollout import SOLVERS

SIGMAS = [0.95, 0.9, 0.7, 0.65, 0.4, 0.3]


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(2 * x + 3 * sigma.reshape(-1, 1, 1, 1)) - x / 2


def scheduler_of(name: str) -> Any:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "sigma_min"}
    if name == "unipc":
        return UniPCMultistepScheduler(**options, solver_type="bh2", lower_order_final=False)
    return DPMSolverMultistepScheduler(
        **options, algorithm_type="dpmsolver++", solver_type="midpoint", lower_order_final=False, euler_at_final=False
    )


# diffusers hands a tensor to numpy in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["dpm", "unipc"])
def test_uneven_steps_go_where_diffusers_goes(name: str) -> None:
    """To 1e-5: diffusers' coefficients are fp32."""
    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scheduler = scheduler_of(name)
    steps = len(SIGMAS) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(SIGMAS)
    x = start
    for index, timestep in enumerate(scheduler.timesteps):
        answer = curved(x, torch.tensor([SIGMAS[index]]))
        x = scheduler.step(answer, timestep, x, return_dict=False)[0]
    grid = torch.tensor(SIGMAS, dtype=torch.float64)[:, None].expand(-1, 2)
    found = SOLVERS[name].integrate(curved, start, grid)
    assert (found - x).abs().max() <= 1e-5 * x.abs().max()
