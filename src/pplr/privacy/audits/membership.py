"""Whose data, and which interactions, an adapter was trained on: told from losses or from top-K lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.item_vectors import ItemVectors
from pplr.data.prompts import Case
from pplr.errors import ConfigError
from pplr.recommend.evaluation import Ranker
from pplr.recommend.metrics import batch_ranks
from pplr.recommend.training import evaluation_loss
from pplr.stages.client_model import ClientModel

__all__ = ["LEAST_PAIRS", "likelihood_ratios", "list_gains", "unit_losses"]

LEAST_PAIRS = 3
"""Fewest pairs of trainings from which a deviation among shadows can be told."""


# -- what an attacker sees of a unit ------------------------------------------------------------------------------


def unit_losses(model: ClientModel, units: Sequence[Sequence[Any]], batch_size: int) -> NDArray[np.float64]:
    """Measure the mean loss per target of each unit under the adapter of a model: (M,).

    Args:
        model: The model as the attacker has it.
        units: M units, the encoded samples of each.
        batch_size: Samples that run at once.
    """
    if isinstance(model.backbone, ItemVectors):
        return _matched_losses(model, model.backbone, units, batch_size)
    return np.array([evaluation_loss(model, own, batch_size) for own in units], dtype=np.float64)


@torch.no_grad()
def _matched_losses(
    model: ClientModel, backbone: ItemVectors, units: Sequence[Sequence[Any]], batch_size: int
) -> NDArray[np.float64]:
    """Measure the same with the catalog placed once, and samples of all units in common batches."""
    flat = [(number, sample) for number, own in enumerate(units) for sample in own]
    flat.sort(key=lambda pair: backbone.length(pair[1]))
    total, targets = np.zeros(len(units)), np.zeros(len(units))
    items = backbone.items(model.output_end)  # (N, width)
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        batch = backbone.collate([sample for _, sample in part])
        states = model.hidden_states(batch)[batch.is_target]  # (S, D)
        scores = (backbone.queries(states, model.output_end) / backbone.config.temperature) @ items.t()
        losses = F.cross_entropy(scores, cast(Tensor, batch.labels), reduction="none").double().cpu().numpy()
        owners = np.array([number for number, _ in part])[batch.is_target.nonzero()[:, 0].cpu().numpy()]
        np.add.at(total, owners, losses)
        np.add.at(targets, owners, 1.0)
    return total / targets


def list_gains(ranker: Ranker, units: Sequence[Sequence[Case]], length: int, batch_size: int) -> NDArray[np.float64]:
    r"""Measure where the items that a unit is known to have taken stand in the top-K lists it is shown: (M,).

    mean over cases of 1 / log2(rank + 1), 0 where the item is not in the list

    Args:
        ranker: Makes the lists. What it scores is not looked at beyond the K-th place.
        units: M units, for each what was asked for: a history, and the item that followed.
        length: K.
        batch_size: Cases that run at once.

    Cites:
        zhang2021membership
    """
    flat = [(number, case) for number, own in enumerate(units) for case in own]
    gains, asked = np.zeros(len(units)), np.zeros(len(units))
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        cases = [case for _, case in part]
        for (number, _), ranks in zip(part, batch_ranks(ranker.scores(cases), cases), strict=True):
            rank = int(ranks[0])
            gains[number] += 1 / np.log2(rank + 1) if rank <= length else 0.0
            asked[number] += 1
    return gains / asked


# -- what is made of it -------------------------------------------------------------------------------------------


def likelihood_ratios(seen: NDArray[np.float64], included: NDArray[np.bool_], *, online: bool) -> NDArray[np.float64]:
    r"""Hold what each training shows of a unit against what shadow trainings show of it.

    offline: (x − μ_out) / σ_out;  online: log N(x; μ_in, σ_in²) − log N(x; μ_out, σ_out²)

    Each training is attacked in turn, and those of the other pairs are its shadows: half of them with the unit, half
    without. Means are the unit's own; with so few shadows, deviations are taken over all units. The other training of
    its own pair is no shadow, as it would tell who was left out.

    Args:
        seen: (2 P, M), higher where a unit looks more like a member.
        included: (2 P, M), as :func:`~pplr.privacy.audits.membership_units.draw_halves` draws it.
        online: Whether the attacker also trains shadows with the unit; else only without it.

    Returns:
        (2 P, M), higher where the unit is likelier a member.

    Raises:
        ConfigError: There are fewer than three pairs.

    Cites:
        carlini2022lira
    """
    trainings = len(seen)
    if trainings < 2 * LEAST_PAIRS:
        raise ConfigError(
            f"{trainings // 2} pairs of trainings are too few to tell a deviation among shadows",
            cure=f"Train at least {LEAST_PAIRS} pairs.",
        )
    told = np.empty_like(seen)
    for number in range(trainings):
        others = np.arange(trainings) // 2 != number // 2
        shadows, taken = seen[others], included[others]
        outside = _gaussian(shadows, ~taken)
        told[number] = (seen[number] - outside[0]) / outside[1]
        if online:
            mean, deviation = _gaussian(shadows, taken)
            inside = (seen[number] - mean) / deviation
            told[number] = (told[number] ** 2 - inside**2) / 2 + np.log(outside[1] / deviation)
    return told


def _gaussian(shadows: NDArray[np.float64], chosen: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """Fit a mean to each unit and one deviation to all: (M,) and a number above 0."""
    count = chosen.sum(axis=0)  # (M,)
    mean = np.where(chosen, shadows, 0.0).sum(axis=0) / count
    squares = np.where(chosen, (shadows - mean) ** 2, 0.0).sum()
    return mean, max(float(np.sqrt(squares / (count - 1).sum())), 1e-12)
