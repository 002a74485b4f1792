"""Floors: rankings without a language model, on the same holdout, that anything larger should beat.

A floor is fitted on the training part only, of all clients pooled. It ranks from ``Case.seen``, the user's whole
past, and not from the few newest items that a prompt has room for: a floor is not to be held down by the prompt.

Adding one is one function below ``_floor``.

Shapes: U users, B cases, N items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from implicit.nearest_neighbours import ItemItemRecommender
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from pplr.data.holdout import Holdout
from pplr.data.prompts import Case
from pplr.errors import ConfigError, DataError, nearest
from pplr.recommend.evaluation import Ranker
from pplr.seeds import derive_seed

__all__ = ["fit_floor", "floor_names"]

_Score = Callable[[csr_matrix], NDArray[np.float32]]
_Fit = Callable[[csr_matrix, int], _Score]
_FLOORS: dict[str, _Fit] = {}


def fit_floor(name: str, holdout: Holdout, item_count: int, seed: int) -> Ranker:
    """Fit a floor on the training part.

    Args:
        name: A registered floor; :func:`floor_names` lists them.
        holdout: Only its ``train`` is read.
        item_count: N, the items of the catalog, also those that nobody took in training.
        seed: The run's seed.

    Returns:
        A ranker, which answers the same for the same seed whatever the number of threads.

    Raises:
        ConfigError: No floor has this name; the message names the nearest.
        DataError: There are no training interactions, or an item is outside the catalog.
    """
    if name not in _FLOORS:
        raise ConfigError(f"no floor is called {name!r}", cure=nearest(name, _FLOORS))
    taken = _matrix(holdout.train, item_count)  # (U, N)
    if taken.nnz == 0:
        raise DataError("a floor cannot be fitted without training interactions", cure="Choose another holdout.")
    with threadpool_limits(limits=1, user_api="blas"):
        return _Floor(_FLOORS[name](taken, derive_seed(seed, "floor", name)), item_count)


def floor_names() -> tuple[str, ...]:
    """List the registered floors."""
    return tuple(_FLOORS)


@dataclass(frozen=True)
class _Floor:
    score: _Score
    item_count: int

    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        with threadpool_limits(limits=1, user_api="blas"):
            return self.score(_matrix([case.seen for case in cases], self.item_count))


def _floor(name: str) -> Callable[[_Fit], _Fit]:
    """Register how to fit a floor: from (U, N) counts and a seed to a function from (B, N) pasts to (B, N) scores."""

    def register(fit: _Fit) -> _Fit:
        _FLOORS[name] = fit
        return fit

    return register


def _matrix(rows: Sequence[Sequence[int] | NDArray[np.int32]], item_count: int) -> csr_matrix:
    """Count each row's items: (len(rows), N)."""
    items = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(row, dtype=np.int64) for row in rows)])
    if items.size and (items.min() < 0 or items.max() >= item_count):
        raise DataError(
            f"items from {items.min()} to {items.max()} do not fit a catalog of {item_count}",
            cure="Use the catalog that the holdout was made from.",
        )
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    counts = csr_matrix((np.ones(len(items), dtype=np.float32), items, starts), shape=(len(rows), item_count))
    counts.sum_duplicates()
    return counts


@_floor("popularity")
def _popularity(taken: csr_matrix, seed: int) -> _Score:
    """Score an item by how often it was taken in training, for everyone alike."""
    counts = np.asarray(taken.sum(axis=0), dtype=np.float32)  # (1, N)
    return lambda pasts: np.repeat(counts, pasts.shape[0], axis=0)


@_floor("item_knn")
def _item_knn(taken: csr_matrix, seed: int) -> _Score:
    """Sum an item's cosine similarities to the user's items, over each of these items' 100 nearest.

    Cosine rather than BM25: of the two, it does better where histories are long, and about as well where they are
    short. It draws nothing, so the seed does not matter.
    """
    once = _once(taken).astype(np.float64)
    lengths = np.sqrt(np.asarray(once.sum(axis=0)).ravel())  # (N,)
    once.data /= lengths[once.indices]
    model = ItemItemRecommender(K=100, num_threads=1)
    model.fit(once, show_progress=False)
    similarity = model.similarity.astype(np.float32)  # (N, N)
    return lambda pasts: np.asarray((_once(pasts) @ similarity).toarray(), dtype=np.float32)


@_floor("als")
def _als(taken: csr_matrix, seed: int) -> _Score:
    """Factorise the training interactions by alternating least squares; a user's factors follow from the past."""
    model = AlternatingLeastSquares(
        factors=64, regularization=1.0, alpha=10.0, iterations=15, num_threads=1, random_state=seed
    )
    model.fit(_once(taken), show_progress=False)

    def score(pasts: csr_matrix) -> NDArray[np.float32]:
        users = model.recalculate_user(np.arange(pasts.shape[0]), _once(pasts))  # (B, factors)
        return np.asarray(users @ model.item_factors.T, dtype=np.float32)

    return score


def _once(counts: csr_matrix) -> csr_matrix:
    """Count an item once however often it was taken."""
    once = counts.copy()
    once.data[:] = 1.0
    return once
