"""Discriminative recommendation: a history becomes a vector, and items are ranked by their cosine with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pplr.backbones.base import MatchingBackbone
from pplr.data.prompts import Case
from pplr.stages.client_model import ClientModel

__all__ = ["MatchingRanker"]


class MatchingRanker:
    """Ranks the full catalog for a user by one client's model as it is now.

    The items are placed once; for a model that has learned since, make another ranker.

    Args:
        model: The client's model, with a backbone that matches.
        history_items: Most items of a history that are read.
    """

    def __init__(self, model: ClientModel, *, history_items: int) -> None:
        if not isinstance(model.backbone, MatchingBackbone):
            raise TypeError(f"this backbone matches no items: {type(model.backbone).__name__}")
        self._model, self._backbone, self._history_items = model, model.backbone, history_items
        model.refresh()
        with torch.no_grad():
            self._items = model.backbone.items(model.output_end)  # (N, width)

    @torch.no_grad()
    def scores(self, cases: Sequence[Case]) -> NDArray[np.float32]:
        """Score every item for every case by its cosine: (B, N), higher is better."""
        batch = self._backbone.pad([case.history[-self._history_items :] for case in cases])
        batch = replace(batch, owners=torch.tensor([case.user for case in cases]))
        states = self._backbone.pool(self._model.hidden_states(batch), batch)  # (B, T, D) -> (B, D)
        scored = self._backbone.queries(states, self._model.output_end) @ self._items.t()
        return np.asarray(scored.cpu().numpy(), dtype=np.float32)
