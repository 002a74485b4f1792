"""Match states with the catalog by their geometry and by how often each occurs, without any weight of the client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pplr.privacy.audits.base import Attacker, Audit, Guess, Knowledge, register
from pplr.privacy.observing import Observation

__all__ = ["Alignment"]

_MOST = 4096
"""Groups of states, and items, that are matched; of more the most frequent ones are."""
_SAMPLE = 1000
_USUAL = 0.9
"""Quantile of the cosines between states that is taken for one of different items: few pairs are of the same."""
_PROFILE = 60
"""Of each item the cosines to so many nearest others say which items it may be."""
_POWERS = (1.0, 0.75, 0.5, 0.0)
"""How far directions in which groups lie are made equally long, one matching for each."""
_SURE = 0.4
"""Correlation of cosines at which a matching is taken for the right one; chance reaches about half of it."""
_STEPS = 30
_FLOOR = 0.01


@register
class Alignment(Audit):
    """max_Π Σ_ab G_ab (Π H Πᵀ)_ab over matchings Π, with the cosines G between groups of states and H between items.

    A secret projection hides which state is which item, but states of one item lie together, whoever took it, so a
    server sees how often each unknown item is taken; and a linear map keeps much of which items are near each other.
    Groups are matched with items so that near ones stay near, by Frank-Wolfe steps from a first matching by popularity
    and by each one's cosines to its nearest. Of several starts the one with the highest correlation is kept.

    It looks at all training passes of a client: too few of them hold too little to match.

    Cites:
        vogelstein2015faq
        grave2019unsupervised
    """

    name: ClassVar[str] = "alignment"
    knows: ClassVar[tuple[Knowledge, ...]] = ("catalog",)
    of_items: ClassVar[bool] = True
    looks_at_everyone: ClassVar[bool] = True

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Match once, then say each state's item.

        Raises:
            ConfigError: The backbone does not read items.
        """
        vectors = attacker.items_of(self.name).vectors.cpu()
        popularity = attacker.popularity.double()
        items = popularity.argsort(descending=True, stable=True)[:_MOST]
        states = torch.cat([own.states for own in seen]).float().cpu()
        groups = _grouped(states)
        counts = torch.bincount(groups).double()
        chosen = counts.argsort(descending=True, stable=True)[:_MOST]
        sums = torch.zeros(len(counts), states.shape[1]).index_add_(0, groups, states)
        centres = (sums / counts[:, None])[chosen]
        found = torch.full((len(counts),), -1)
        expected = popularity[items] / popularity.sum() * counts.sum()
        found[chosen] = items[_matched(centres, counts[chosen], vectors[items], expected)]
        said = [None if item < 0 else item for item in found[groups].tolist()]
        ends = np.cumsum([own.length for own in seen]).tolist()
        return [Guess(tuple(said[end - own.length : end])) for own, end in zip(seen, ends, strict=True)]


def _grouped(states: Tensor) -> Tensor:
    """Put states together that are much nearer than states usually are: (M, D) -> (M,) numbers of groups.

    Directions are made equally long first, since items that are alike share the long ones. The order in which states
    come does not matter.
    """
    order = states[:, 0].argsort(stable=True)
    units = torch.nn.functional.normalize(_evened(states, 1.0), dim=1)[order]
    sample = torch.arange(0, len(units), max(1, len(units) // _SAMPLE))
    cosines = units[sample] @ units.T
    cosines[torch.arange(len(sample)), sample] = -1.0
    usual = float(np.quantile(cosines[:, sample].numpy(), _USUAL))
    threshold = (usual + float(cosines.max(dim=1).values.median())) / 2
    numbers = torch.full((len(units),), -1)
    left = torch.arange(len(units))
    number = 0
    while len(left):
        near = units[left] @ units[left[0]] > threshold
        near[0] = True
        centre = torch.nn.functional.normalize(units[left[near]].mean(dim=0), dim=0)
        near |= units[left] @ centre > threshold
        numbers[left[near]] = number
        left, number = left[~near], number + 1
    groups = torch.empty_like(numbers)
    groups[order] = numbers
    return groups


def _matched(centres: Tensor, counts: Tensor, vectors: Tensor, expected: Tensor) -> Tensor:
    """Match C groups with N items: (C,) items, or -1 where there are more groups than items.

    Args:
        centres: (C, D), the mean of each group's states.
        counts: (C,), how many states each group has.
        vectors: (N, D), of the items.
        expected: (N,), how many states of each item there should be.
    """
    catalog = _cosines(vectors.double() - vectors.double().mean(dim=0))
    frequencies = -((counts.log1p()[:, None] - expected.log1p()[None]) ** 2)
    best, reached = torch.full((len(centres),), -1), -1.0
    for power in _POWERS:
        groups = _cosines(_evened(centres.double(), power))
        start = torch.softmax(frequencies + _profiles(groups, catalog), dim=1)
        items = _climb(groups, catalog, start)
        correlation = _correlation(groups, catalog, items)
        if correlation > reached:
            best, reached = items, correlation
        if reached >= _SURE:
            break
    return best


def _evened(rows: Tensor, power: float) -> Tensor:
    """Make the directions in which rows lie more equally long: (M, D) -> (M, D)."""
    centred = rows - rows.mean(dim=0)
    squares, directions = torch.linalg.eigh(centred.T @ centred)
    squares = squares.clamp(min=0)
    floor = squares.mean() * _FLOOR + 1e-12
    return centred @ (directions / (squares + floor).pow(power / 2))


def _cosines(rows: Tensor) -> Tensor:
    units = torch.nn.functional.normalize(rows, dim=1)
    return (units @ units.T).fill_diagonal_(0.0)


def _profiles(groups: Tensor, catalog: Tensor) -> Tensor:
    """Compare each one's cosines to its nearest, in order of size: (C, N), of standard deviation 1."""
    most = min(_PROFILE, len(groups), len(catalog))
    near, other = (own.sort(dim=1, descending=True).values[:, :most] for own in (groups, catalog))
    alike = -torch.cdist(near, other)
    return alike / alike.std().clamp(min=1e-12)


def _climb(groups: Tensor, catalog: Tensor, start: Tensor) -> Tensor:
    """Go from a soft matching (C, N) to the nearest best one, and tell it: (C,)."""
    soft = start
    for _ in range(_STEPS):
        gradient = groups @ soft @ catalog
        step = _vertex(gradient) - soft
        slope, curve = 2 * float((gradient * step).sum()), float(((groups @ step @ catalog) * step).sum())
        if slope <= 1e-9:
            break
        soft = soft + step * (1.0 if curve >= 0 else min(1.0, -slope / (2 * curve)))
    found = torch.full((len(soft),), -1)
    for group, item in _assignment(soft):
        found[group] = item
    return found


def _assignment(gain: Tensor) -> Iterator[tuple[int, int]]:
    """Match one to one with the highest sum."""
    groups, items = linear_sum_assignment(gain.numpy(), maximize=True)
    return zip(groups.tolist(), items.tolist(), strict=True)


def _vertex(gain: Tensor) -> Tensor:
    matched = torch.zeros_like(gain)
    for group, item in _assignment(gain):
        matched[group, item] = 1.0
    return matched


def _correlation(groups: Tensor, catalog: Tensor, items: Tensor) -> float:
    """Say how alike the cosines are under a matching."""
    known = items >= 0
    own, other = groups[known][:, known], catalog[items[known]][:, items[known]]
    return float((own * other).sum() / (own.norm() * other.norm()).clamp(min=1e-12))
