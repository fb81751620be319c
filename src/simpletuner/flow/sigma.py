"""Densities of sigma for training, shifts, and sigma schedules for sampling.

A density is a quantile function: it maps a uniform draw u in (0, 1) to sigma. One number determines one sample, so
draws can be keyed and stratified, and the density can be plotted.
"""

import math
from collections.abc import Callable, Sequence

Density = Callable[[float], float]

LARGEST_U = 1 - 2.0**-53
"""The largest fp64 number below 1. At 1, a quantile can be infinite."""


def normal_quantile(u: float) -> float:
    """Quantile of the standard normal, by Newton's method on the error function (accurate to 1e-14 in the bulk)."""
    if not 0 < u < 1:
        raise ValueError(f"a quantile is defined for 0 < u < 1, not {u}")
    # Start from Hastings' approximation (Abramowitz & Stegun 26.2.23, error < 4.5e-4).
    tail = min(u, 1 - u)
    t = math.sqrt(-2 * math.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    for _ in range(4):
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        z += (0.5 * math.erfc(z / math.sqrt(2)) - tail) / density
    return -z if u < 0.5 else z


def sigmoid_density(scale: float) -> Density:
    """sigma = sigmoid(scale · N(0, 1)): the logit-normal density that FLUX trainers use."""
    return lambda u: 1 / (1 + math.exp(-scale * normal_quantile(u)))


def uniform_density() -> Density:
    return lambda u: u


def listed_density(sigmas: Sequence[float]) -> Density:
    """Each entry of `sigmas` with equal probability; a value that is listed twice is twice as likely."""
    rising = sorted(sigmas)
    return lambda u: rising[min(int(u * len(rising)), len(rising) - 1)]


def in_stratum(u: float, stratum: int, strata: int) -> float:
    """Map `u` in (0, 1) into the `stratum`-th of `strata` equal parts of (0, 1).

    If all strata are equally likely, the result is as uniform as `u`. If each stratum occurs once, the results cover
    (0, 1) evenly.
    """
    return min((stratum + u) / strata, LARGEST_U)


def beta_density(alpha: float, beta: float) -> Density:
    """Sigma distributed as Beta(alpha, beta), by bisection of the distribution function."""

    def quantile(u: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if beta_cdf(middle, alpha, beta) < u:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    return quantile


def beta_cdf(x: float, alpha: float, beta: float) -> float:
    """The regularized incomplete beta function I_x(alpha, beta), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (alpha + 1) / (alpha + beta + 2):  # the fraction converges fast only below this point
        return 1 - beta_cdf(1 - x, beta, alpha)
    log_front = (
        math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta) + alpha * math.log(x) + beta * math.log1p(-x)
    )
    fraction = 1.0
    # It converges in O(√max(alpha, beta)) terms. Evaluation starts at the last term, so extra terms are harmless.
    for m in range(20 + math.ceil(5 * math.sqrt(max(alpha, beta))), 0, -1):
        odd = -(alpha + m - 1) * (alpha + beta + m - 1) * x / ((alpha + 2 * m - 2) * (alpha + 2 * m - 1))
        even = m * (beta - m) * x / ((alpha + 2 * m - 1) * (alpha + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    return math.exp(log_front) / (alpha * fraction)


def shifted(sigma: float, shift: float) -> float:
    """Shift sigma toward noise: s·σ / (1 + (s − 1)·σ). A shift of 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def mu_linear(tokens: int) -> float:
    """Log of FLUX.1's training shift: a line through (256, 0.5) and (4096, 1.15), over image tokens."""
    return 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def mu_empirical(tokens: int, steps: int) -> float:
    """Log of the shift of FLUX.2's sampler (`compute_empirical_mu` of black-forest-labs/flux2, `sampling.py`).

    It interpolates linearly between two lines over `tokens`, for 10 and for 200 steps. Above 4300 tokens it uses the
    200-step line for any number of steps.
    """
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    slope = (at_200 - at_10) / 190
    return at_200 + slope * (steps - 200)


def schedule(steps: int, tokens: int) -> list[float]:
    """The `steps + 1` sigmas of FLUX.2's sampler, from 1 down to 0, for an image of `tokens` tokens."""
    shift = math.exp(mu_empirical(tokens, steps))
    return [shifted(1 - index / steps, shift) for index in range(steps)] + [0.0]
