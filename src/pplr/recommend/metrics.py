"""What a ranking is worth: Recall, NDCG, Hit and MRR over the full catalog, ties broken pessimistically.

Shapes: B cases, N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError

__all__ = ["batch_ranks", "ranking_metrics", "spread", "summarise", "target_ranks"]


def target_ranks(scores: NDArray[Any], targets: Sequence[int], seen: Sequence[int]) -> NDArray[np.int64]:
    r"""Find where each target stands in the catalog, sorted by descending score without the seen items.

    rank(t) = 1 + #{other items j : s_j ≥ s_t} + #{targets before t : s = s_t} + #{targets : s > s_t}

    "Other items" are neither seen nor targets. An item that ties with a target goes before it, so a model that
    scores everything alike gains nothing; targets that tie stand in the order given. A score of -inf is the last
    place, behind every item that can be recommended. A target that is itself in ``seen`` is never recommended,
    so it counts as -inf too.

    Args:
        scores: (N,) scores, higher is better.
        targets: Item numbers, each once.
        seen: Item numbers to mask.

    Returns:
        One position for each target, counted from 1.

    Raises:
        DataError: A score is NaN, an item number is outside the catalog, or a target is named twice.

    Example:
        >>> target_ranks(np.array([0.9, 0.5, 0.5, 0.1]), targets=[2, 3], seen=[0])
        array([2, 3])
    """
    return _batch_ranks(np.asarray(scores)[None], [(targets, seen)])[0]


def batch_ranks(scores: NDArray[Any], cases: Sequence[Case]) -> list[NDArray[np.int64]]:
    """Rank the targets of many cases at once, as :func:`target_ranks` does for one.

    Args:
        scores: (B, N) scores, higher is better.
        cases: B cases.

    Returns:
        For each case, one position for each of its targets.

    Raises:
        DataError: As :func:`target_ranks`, or there is not one row of scores for each case.
    """
    return _batch_ranks(np.asarray(scores), [(case.targets, case.seen) for case in cases])


def _batch_ranks(scores: NDArray[Any], cases: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[NDArray[np.int64]]:
    if scores.ndim != 2 or len(scores) != len(cases):
        raise DataError(
            f"scores of shape {scores.shape} for {len(cases)} users", cure="Give one row of N scores for each user."
        )
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        bad = int(np.flatnonzero(np.isnan(scores).any(axis=1))[0])
        raise DataError(
            f"row {bad} of the scores holds NaN", cure="Look for a diverged adapter or an overflow before ranking."
        )
    targets, has_target = _padded([_checked(case[0], scores.shape[1]) for case in cases])  # (B, S)
    aside = [np.union1d(np.asarray(t, np.int64), _checked(s, scores.shape[1], once=False)) for t, s in cases]
    left_out, is_left_out = _padded(aside)  # (B, E)
    of_target = np.take_along_axis(scores, targets, axis=1)
    for row, (wanted, seen) in enumerate(cases):
        of_target[row, : len(wanted)][np.isin(wanted, seen)] = -np.inf
    of_left_out = np.take_along_axis(scores, left_out, axis=1)
    ranks = np.ones(targets.shape, dtype=np.int64)
    for slot in range(targets.shape[1]):
        rows = np.flatnonzero(has_target[:, slot])
        own = of_target[rows, slot, None]  # (rows, 1)
        others = (scores[rows] >= own).sum(axis=1) - ((of_left_out[rows] >= own) & is_left_out[rows]).sum(axis=1)
        fellows = (of_target[rows] > own) & has_target[rows]
        earlier = (of_target[rows, :slot] == own).sum(axis=1)
        ranks[rows, slot] += others + fellows.sum(axis=1) + earlier
    return [ranks[row, : len(case[0])] for row, case in enumerate(cases)]


def _checked(items: Sequence[int], item_count: int, *, once: bool = True) -> NDArray[np.int64]:
    array = np.asarray(items, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= item_count):
        wrong = int(array.min() if array.min() < 0 else array.max())
        raise DataError(
            f"item {wrong} is not among the {item_count} items scored", cure="Score the whole catalog, in its order."
        )
    if once and len(np.unique(array)) != array.size:
        raise DataError(f"a target is named twice in {list(items)[:10]}", cure="Name each target once.")
    return array


def _padded(rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Stack rows of unequal length, with a mask of what is real."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    real = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
    padded = np.zeros(real.shape, dtype=np.int64)
    if len(rows):
        padded[real] = np.concatenate(rows)
    return padded, real


def ranking_metrics(ranks: NDArray[np.int64] | Sequence[int], cutoffs: Sequence[int]) -> dict[str, float]:
    r"""Measure one user's ranking.

    recall@K = #{r ≤ K} / #targets;  hit@K = 1 if any r ≤ K;  mrr = 1 / min(r), over the whole catalog;
    ndcg@K = Σ_{r ≤ K} 1/log2(r + 1)  /  Σ_{i = 1 .. min(#targets, K)} 1/log2(i + 1)

    Args:
        ranks: The position of each target, counted from 1.
        cutoffs: The values of K.

    Returns:
        ``recall@K``, ``ndcg@K`` and ``hit@K`` for each K in turn, then ``mrr``.

    Raises:
        ConfigError: A cutoff is not a positive whole number.
        DataError: There is no target.

    Example:
        >>> ranking_metrics([3], cutoffs=[5])
        {'recall@5': 1.0, 'ndcg@5': 0.5, 'hit@5': 1.0, 'mrr': 0.3333333333333333}
    """
    ranks = np.asarray(ranks, dtype=np.int64)
    if ranks.size == 0:
        raise DataError("a user without a target cannot be measured", cure="Leave users without targets out.")
    values: dict[str, float] = {}
    for cutoff in cutoffs:
        if not isinstance(cutoff, int | np.integer) or cutoff < 1:
            raise ConfigError(f"a cutoff of {cutoff!r} is no length of a list", cure="Give cutoffs of 1 or more.")
        found = ranks[ranks <= cutoff]
        ideal = np.arange(1, min(ranks.size, cutoff) + 1)
        values[f"recall@{cutoff}"] = found.size / ranks.size
        values[f"ndcg@{cutoff}"] = float(_discounts(found) / _discounts(ideal))
        values[f"hit@{cutoff}"] = float(found.size > 0)
    values["mrr"] = 1.0 / float(ranks.min())
    return values


def _discounts(ranks: NDArray[np.int64]) -> float:
    return float((1.0 / np.log2(ranks + 1.0)).sum())


def summarise(per_user: Mapping[str, NDArray[Any]]) -> dict[str, float | None]:
    """Average each metric over users, every user counting the same.

    Args:
        per_user: For each metric, (B,) values.

    Returns:
        The means; ``None``, never 0, where there is no user.

    Example:
        >>> summarise({"hit@1": np.array([1.0, 0.0]), "mrr": np.array([])})
        {'hit@1': 0.5, 'mrr': None}
    """
    return {metric: float(np.mean(values)) if len(values) else None for metric, values in per_user.items()}


def spread(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Say how unequally the clients fare, every client counting the same.

    Args:
        values: One metric's mean for each client, higher is better; clients without users (``None``) are left out.

    Returns:
        ``worst``, ``best``, ``std`` (of the population: the clients are all there are, so the sum of squares is
        divided by their number) and ``gap`` = best - worst; each ``None`` when no client has a value.

    Example:
        >>> spread({"a": 0.25, "b": 0.75, "c": None})
        {'worst': 0.25, 'best': 0.75, 'std': 0.25, 'gap': 0.5}
    """
    known = np.array([value for value in values.values() if value is not None], dtype=np.float64)
    if not known.size:
        return {"worst": None, "best": None, "std": None, "gap": None}
    worst, best = float(known.min()), float(known.max())
    return {"worst": worst, "best": best, "std": float(known.std()), "gap": best - worst}
