"""Discriminative recommendation: a history becomes a vector, and items are ranked by their cosine with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pplr.backbones.item_vectors import ItemVectors
from pplr.data.prompts import Case
from pplr.stages.model import ClientModel

__all__ = ["MatchingRanker"]


class MatchingRanker:
    """Ranks the full catalog for a user by one client's model.

    Args:
        model: The client's model, with an ``item_vectors`` backbone.
        history_items: Most items of a history that are read.
    """

    def __init__(self, model: ClientModel, *, history_items: int) -> None:
        if not isinstance(model.backbone, ItemVectors):
            raise TypeError(f"only item_vectors match, not {type(model.backbone).__name__}")
        self._model, self._backbone, self._history_items = model, model.backbone, history_items

    @torch.no_grad()
    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Score every item for every case by its cosine: (B, N), higher is better."""
        batch = self._backbone.pad([case.history[-self._history_items :] for case in cases])
        states = self._model.hidden_states(batch)  # (B, T, D)
        last = states[torch.arange(len(cases)), batch.lengths - 1]  # (B, D)
        ends = self._model.output_end
        scored = self._backbone.queries(last, ends) @ self._backbone.items(ends).t()
        return np.asarray(scored.cpu().numpy(), dtype=np.float32)
