"""ε against an accountant of our own: slow, on a grid, with a bound from either side."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy.special import ndtr

from pplr.errors import ConfigError
from pplr.privacy.accounting import epsilon_of
from pplr.testing import refuses

_GRID = 1e-3


def _loss_masses(q: float, sigma: float, steps: int, *, up: bool, remove: bool) -> tuple[np.ndarray, np.ndarray]:
    """The privacy loss of one step on a grid, each outcome rounded up or down, then composed by a long convolution.

    The losses are of P = (1 - q) N(0, σ²) + q N(1, σ²) against Q = N(0, σ²), or of Q against P.
    """
    span = 12 * sigma + 1
    x = np.linspace(-span, span, 400_001)
    cdf_q = ndtr(x / sigma)
    cdf_p = (1 - q) * cdf_q + q * ndtr((x - 1) / sigma)
    loss = np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))  # log P / Q, growing with x
    mass = np.diff(cdf_p if remove else cdf_q)
    ends = np.sort(np.stack([loss[:-1], loss[1:]]) * (1 if remove else -1), axis=0)
    cells = np.ceil(ends[1] / _GRID) if up else np.floor(ends[0] / _GRID)
    cells = cells.astype(int)
    low = int(cells.min())
    one = np.bincount(cells - low, weights=mass)
    size = 1 << (len(one) * steps).bit_length()
    many = np.fft.irfft(np.fft.rfft(one, size) ** steps, size)
    return (np.arange(size) + low * steps) * _GRID, np.maximum(many, 0)


def _epsilon(q: float, sigma: float, steps: int, delta: float, *, up: bool) -> float:
    worst = 0.0
    for remove in (True, False):
        losses, masses = _loss_masses(q, sigma, steps, up=up, remove=remove)
        low, high = 0.0, 100.0
        while high - low > 1e-5:
            middle = (low + high) / 2
            above = losses > middle
            spent = float((masses[above] * -np.expm1(middle - losses[above])).sum())
            low, high = (middle, high) if spent > delta else (low, middle)
        worst = max(worst, high)
    return worst


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta"),
    [
        (0.1, 1.0, 20, 1e-5),
        (0.5, 2.0, 8, 1e-5),
        (0.25, 0.8, 3, 1e-4),
        (0.05, 0.7, 40, 1e-6),
        (1.0, 3.0, 5, 1e-5),
    ],
)
def test_epsilon_lies_between_the_bounds_of_an_independent_accountant(q, sigma, steps, delta):
    below = _epsilon(q, sigma, steps, delta, up=False)
    above = _epsilon(q, sigma, steps, delta, up=True)
    assert above - below < 0.15  # else they would say little
    assert below - 1e-3 <= epsilon_of([(steps, q, sigma)], delta) <= above + 1e-3


def test_without_sampling_it_is_the_gaussian_mechanism_s():
    """Balle and Wang's formula; n steps of noise σ are one of noise σ / √n."""
    sigma, delta = 2.0 / math.sqrt(10), 1e-5
    epsilon = epsilon_of([(10, 1.0, 2.0)], delta)
    spent = ndtr(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * ndtr(-1 / (2 * sigma) - epsilon * sigma)
    assert spent == pytest.approx(delta, rel=0.02)


def test_it_grows_with_steps_and_rate_and_falls_with_noise():
    base = epsilon_of([(10, 0.1, 1.0)], 1e-5)
    assert epsilon_of([(11, 0.1, 1.0)], 1e-5) > base
    assert epsilon_of([(10, 0.2, 1.0)], 1e-5) > base
    assert epsilon_of([(10, 0.1, 1.1)], 1e-5) < base
    assert epsilon_of([(10, 0.1, 1.0)], 1e-6) > base
    assert epsilon_of([(4, 0.1, 1.0), (6, 0.1, 1.0)], 1e-5) == base
    assert epsilon_of([(10, 0.1, 1.0), (3, 0.5, 2.0)], 1e-5) > base


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with refuses(ConfigError, "privacy"):
        epsilon_of([(7, 0.123, 4.56)], 1e-5)
