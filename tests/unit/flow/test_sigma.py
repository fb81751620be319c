import math

import pytest
import torch
from torch.distributions import Beta, Normal

from simpletuner.flow import sigma


# black-forest-labs/flux2 `compute_empirical_mu`, three decimals.
@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [
        (1024, 4, 2.031), (1024, 28, 1.859), (1024, 50, 1.702),
        (2304, 4, 2.139), (2304, 28, 1.981), (2304, 50, 1.836),
        (4080, 4, 2.290), (4080, 28, 2.150), (4080, 50, 2.022),
        (4096, 4, 2.291), (4096, 28, 2.151), (4096, 50, 2.023),
        (9216, 4, 2.017), (9216, 28, 2.017), (9216, 50, 2.017),
        (16384, 4, 3.230), (16384, 28, 3.230), (16384, 50, 3.230),
    ],
)  # fmt: skip
def test_the_table_of_empirical_mu(tokens: int, steps: int, mu: float) -> None:
    assert sigma.mu_empirical(tokens, steps) == pytest.approx(mu, abs=6e-4)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.630), (2304, 0.847), (4096, 1.150), (9216, 2.017)])
def test_the_training_shift_counts_true_image_tokens(tokens: int, mu: float) -> None:
    assert sigma.mu_linear(tokens) == pytest.approx(mu, abs=6e-4)


def test_1024_squared_has_4096_tokens_and_shift_3_16() -> None:
    assert math.exp(sigma.mu_linear(1024 * 1024 // 256)) == pytest.approx(3.158, abs=1e-3)


@pytest.mark.parametrize(
    ("tokens", "steps", "expected"),
    [
        (4096, 4, [1, 0.967384, 0.908144, 0.767200, 0]),
        (1024, 4, [1, 0.958085, 0.883982, 0.717497, 0]),
        (4096, 8, [1, 0.985426, 0.966641, 0.941515, 0.906183, 0.852842, 0.763015, 0.579807, 0]),
    ],
)
def test_golden_schedules(tokens: int, steps: int, expected: list[float]) -> None:
    assert sigma.schedule(steps, tokens) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("u", [1e-12, 1e-6, 0.001, 0.2, 0.5, 0.7, 0.999, 1 - 1e-9])
def test_the_normal_quantile_is_the_normal_quantile(u: float) -> None:
    exact = Normal(0.0, 1.0).icdf(torch.tensor(u, dtype=torch.float64)).item()
    assert sigma.normal_quantile(u) == pytest.approx(exact, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("u", [0.0, 1.0, -0.1, float("nan")])
def test_a_quantile_outside_the_open_interval_is_refused(u: float) -> None:
    with pytest.raises(ValueError, match="0 < u < 1"):
        sigma.normal_quantile(u)


def test_a_shift_of_one_changes_nothing() -> None:
    assert [sigma.shifted(s, 1.0) for s in (0.0, 0.1, 0.77, 1.0)] == [0.0, 0.1, 0.77, 1.0]


def test_a_shift_keeps_the_ends_and_moves_the_middle_toward_noise() -> None:
    assert sigma.shifted(0.0, 3.0) == 0.0
    assert sigma.shifted(1.0, 3.0) == 1.0
    assert sigma.shifted(0.5, 3.0) == pytest.approx(0.75)


def test_sigmoid_density_has_its_median_at_a_half_and_its_quartiles_at_the_logistic_of_the_normals() -> None:
    density = sigma.sigmoid_density(1.0)
    assert density(0.5) == pytest.approx(0.5)
    assert density(0.75) == pytest.approx(1 / (1 + math.exp(-0.6744897501960817)))
    assert sigma.sigmoid_density(2.0)(0.75) > density(0.75)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.5, 3.0), (5.0, 1.0), (1.0, 1.0), (30.0, 40.0)])
def test_beta_density_inverts_the_integral_of_the_beta_distribution(alpha: float, beta: float) -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64))
    for u in (0.05, 0.3, 0.5, 0.9):
        x = sigma.beta_density(alpha, beta)(u)
        integral = density.log_prob(grid).exp()[grid < x].sum().item() / 200_000
        assert integral == pytest.approx(u, abs=2e-3)


def test_listed_sigmas_are_drawn_alike_whatever_their_order() -> None:
    density = sigma.listed_density([0.8, 0.2, 0.5, 0.2])
    assert [density((index + 0.5) / 4) for index in range(4)] == [0.2, 0.2, 0.5, 0.8]
    assert (density(2.0**-53), density(sigma.LARGEST_U)) == (0.2, 0.8)


def test_strata_cover_the_unit_interval_and_never_reach_its_ends() -> None:
    assert [sigma.in_stratum(0.5, stratum, 4) for stratum in range(4)] == [0.125, 0.375, 0.625, 0.875]
    assert sigma.in_stratum(2.0**-53, 0, 10**6) > 0
    assert sigma.in_stratum(sigma.LARGEST_U, 10**6 - 1, 10**6) < 1
