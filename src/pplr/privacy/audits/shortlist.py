"""Which candidates are worth running: a linear map from states to embeddings, learned on auxiliary passes."""

from __future__ import annotations

import torch
from torch import Tensor

from pplr.privacy.audits.base import Attacker

__all__ = ["Shortlist"]

_RIDGE = 1e-3
_PASSES = 64


class Shortlist:
    """Proposes the tokens whose embeddings are nearest to what a state maps to.

    e = W h + b, by ridge regression. A state also holds what came before its token, which the map learns to leave out.

    Args:
        attacker: Whose auxiliary passes it learns from.
        passes: How many.
    """

    def __init__(self, attacker: Attacker, passes: int = _PASSES) -> None:
        tokens, states = attacker.auxiliary_pairs(passes)
        self._table = attacker.replica.embeddings(attacker.replica.vocabulary()).cpu()  # (V, D)
        wanted, given = self._table[tokens].double(), _with_one(states.double())
        gram = given.t() @ given
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self._map = torch.linalg.solve(gram, given.t() @ wanted).float()  # (D + 1, D)

    def ranked(self, states: Tensor, candidates: Tensor, count: int) -> Tensor:
        """Pick the candidates to try at one state.

        Args:
            states: (D,).
            candidates: (S,) tokens.
            count: Most to return.

        Returns:
            At most ``count`` of them, the most promising first.
        """
        if len(candidates) <= count:
            return candidates
        expected = _with_one(states[None].cpu()) @ self._map  # (1, D)
        distances = (self._table[candidates] - expected).norm(dim=-1)
        return candidates[distances.topk(count, largest=False).indices]


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
