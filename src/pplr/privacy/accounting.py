"""How much of a user's privacy a number of training steps spends."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from pplr.errors import ConfigError

__all__ = ["Spending", "epsilon_of"]

_GRID = 1e-4
_LITTLE = 0.5
"""Below this noise multiplier losses are so large that the grid grows with them, or they would not fit in memory."""

Spending = tuple[int, float, float]
"""Steps, the rate q at which users are drawn in each, and the noise multiplier σ."""


def epsilon_of(spendings: Iterable[Spending], delta: float) -> float:
    r"""Compute ε at δ of steps of the Gaussian mechanism, each on users that are drawn alone at a rate.

    Two datasets are neighbours when one has all samples of one user more. The steps' privacy loss distributions are
    composed on a grid whose rounding only ever makes ε larger.

    Args:
        spendings: What was spent, in any order.
        delta: δ.

    Raises:
        ConfigError: The package that accounts is not installed.

    Cites:
        koskela2020pld

    Example:
        >>> epsilon_of([], 1e-5)
        0.0
        >>> 7.5 < epsilon_of([(4, 1.0, 2.0), (6, 1.0, 2.0)], 1e-5) < 7.52
        True
    """
    steps: dict[tuple[float, float], int] = {}
    for count, sampling_rate, noise_multiplier in spendings:
        kind = (sampling_rate, noise_multiplier)
        steps[kind] = steps.get(kind, 0) + count
    return _epsilon(tuple(sorted((count, *kind) for kind, count in steps.items() if count)), delta)


@lru_cache(maxsize=1024)
def _epsilon(spendings: tuple[Spending, ...], delta: float) -> float:
    if not spendings:
        return 0.0
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise ConfigError(
            "private training needs the package dp-accounting, which is not installed",
            cure="Install it: pip install 'pplr[privacy]'.",
        ) from error
    least = min(noise_multiplier for _, _, noise_multiplier in spendings)
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_GRID * max(1.0, (_LITTLE / least) ** 2),
    )
    for count, sampling_rate, noise_multiplier in spendings:
        step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
        accountant.compose(step, count)
    return float(accountant.get_epsilon(delta))
