"""How well scores tell members from non-members: the ROC curve at a few points, with intervals over users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pplr.errors import DataError

__all__ = ["FALSE_POSITIVE_RATES", "NO_INFORMATION", "measure_roc"]

FALSE_POSITIVE_RATES = (0.01, 0.001)
"""Shares of the non-members that an attacker may take for members."""

NO_INFORMATION: Mapping[str, float] = {"auc": 0.5} | {f"tpr@{rate:g}": rate for rate in FALSE_POSITIVE_RATES}
"""What an attacker who knows nothing reaches."""

_RESAMPLES = 1_000
_AT_ONCE = 4_000_000
"""Weights that are in memory at once."""


def measure_roc(
    scores: NDArray[np.float64], is_member: NDArray[np.bool_], users: NDArray[np.int64], draw: np.random.Generator
) -> dict[str, dict[str, float] | None]:
    """Measure how well higher scores tell members, with 95 % intervals by resampling users.

    A resampled user comes with all of its trials, so trials of one user need not be independent.

    Args:
        scores: (M,) of each trial.
        is_member: (M,) whether it was a member.
        users: (M,) whose trial it is.
        draw: Resamples the users.

    Returns:
        ``auc`` and, for each rate of :data:`FALSE_POSITIVE_RATES`, ``tpr@RATE``, the largest share of members found by
        a threshold that takes no larger share of non-members for members: ``value``, ``low`` and ``high``. ``None``
        where there are too few non-members for a single false positive at that rate.

    Raises:
        DataError: There is no member or no non-member, or a score is not finite.
    """
    if not is_member.any() or is_member.all():
        raise DataError("a ROC curve needs members and non-members", cure="Leave some out, and some in.")
    if not np.isfinite(scores).all():
        raise DataError("a score is not finite", cure="Look for a diverged adapter.")
    order = np.argsort(-scores, kind="stable")
    ranked, members = scores[order], is_member[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # (G,), a group for each score
    known, owner = np.unique(users[order], return_inverse=True)
    found = _points(np.ones((1, len(scores))), members, starts)
    resamples = []
    at_once = max(1, _AT_ONCE // len(scores))
    for done in range(0, _RESAMPLES, at_once):
        drawn = draw.integers(len(known), size=(min(at_once, _RESAMPLES - done), len(known)))
        counts = np.stack([np.bincount(row, minlength=len(known)) for row in drawn])  # (R, U)
        resamples.append(_points(counts[:, owner].astype(np.float64), members, starts))
    told: dict[str, dict[str, float] | None] = {}
    others = int((~is_member).sum())
    for name, least in NO_INFORMATION.items():
        if name != "auc" and others * least < 1:
            told[name] = None
            continue
        low, high = np.nanquantile(np.concatenate([own[name] for own in resamples]), [0.025, 0.975])
        told[name] = {"value": float(found[name][0]), "low": float(low), "high": float(high)}
    return told


def _points(weights: NDArray[Any], members: NDArray[np.bool_], starts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Measure under R weightings of the trials, best score first: each (R,), NaN where one side has no weight.

    Trials of one score are a group, which a threshold takes or leaves as a whole.
    """
    right = np.add.reduceat(weights * members, starts, axis=1).cumsum(axis=1)  # (R, G)
    wrong = np.add.reduceat(weights * ~members, starts, axis=1).cumsum(axis=1)
    empty = (right[:, -1] == 0) | (wrong[:, -1] == 0)
    right, wrong = (own / np.where(empty, np.nan, own[:, -1])[:, None] for own in (right, wrong))
    right, wrong = (np.pad(own, ((0, 0), (1, 0))) for own in (right, wrong))  # nobody is taken for a member
    told = {"auc": (np.diff(wrong, axis=1) * (right[:, 1:] + right[:, :-1]) / 2).sum(axis=1)}
    for rate in FALSE_POSITIVE_RATES:
        told[f"tpr@{rate:g}"] = np.where(empty, np.nan, np.where(wrong <= rate + 1e-12, right, 0.0).max(axis=1))
    return told
