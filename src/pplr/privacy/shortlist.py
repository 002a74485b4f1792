"""Which candidates are worth running: a linear map from states to embeddings, learned on auxiliary passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Shortlist"]

_RIDGE = 1e-3


class Shortlist:
    """Proposes the tokens whose embeddings are nearest to what a state maps to.

    e = W h + b, by ridge regression. A state also holds what came before its token, which the map learns to leave out.

    Args:
        tokens: (M,), of auxiliary passes.
        states: (M, D), theirs at the first cut.
        table: (V, D), what the attacker takes for the embedding of every token.
    """

    def __init__(self, tokens: Tensor, states: Tensor, table: Tensor) -> None:
        self._table = table
        self._sizes = table.square().sum(dim=-1)  # (V,)
        wanted, given = table[tokens].double(), _with_one(states.double())
        gram = given.t() @ given
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self._map = torch.linalg.solve(gram, given.t() @ wanted).float()  # (D + 1, D)

    def of(self, states: Tensor) -> Callable[[int, Tensor, int], Tensor]:
        """Look at all states of a pass at once.

        Args:
            states: (T, D).

        Returns:
            A function that picks, at a position and among candidates (S,), at most so many, the most promising first.
        """
        expected = _with_one(states.cpu()) @ self._map  # (T, D)
        distances = self._sizes - 2 * expected @ self._table.t()  # (T, V), squared and up to a constant of each state

        def ranked(position: int, candidates: Tensor, count: int) -> Tensor:
            count = min(count, len(candidates))
            return candidates[distances[position, candidates].topk(count, largest=False).indices]

        return ranked


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
