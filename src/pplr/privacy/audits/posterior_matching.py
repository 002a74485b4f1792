"""Weigh how near an item's state is by the noise that is known, and by how popular the item is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from pplr.privacy.audits.base import Attacker, Audit, Guess, Knowledge, register
from pplr.privacy.observing import Observation

__all__ = ["PosteriorMatching"]

_PASSES = 400
_HELD_OUT = 4
"""One auxiliary pass in so many tells how far states lie from where they are expected."""
_RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Weights of staying with an item's state alone, as shares of how much states vary; held-out passes choose one."""
_FLOOR = 1e-4
"""Variance that is added in every direction, as a share of the mean one: about what bfloat16 rounds away."""


@register
class PosteriorMatching(Audit):
    r"""The items that are likeliest altogether, each at most once: argmax Σ_t log p(x_t) − ½ ‖h_t − m(x_t)‖²_Σ⁻¹.

    p is an item's popularity. m is linear in the state that the item has when it stands alone, and learned on
    auxiliary passes, as is the covariance Σ of what remains, in which the noise is. So the attacker learns on states
    that are guarded as the client's are, and where they tell nothing it names the most popular items. An attacker who
    has histories of other users, and knows which items go together, may find more.

    Cites:
        thomas2025hidden
    """

    name: ClassVar[str] = "posterior_matching"
    by_default: ClassVar[bool] = False
    in_noise: ClassVar[bool] = True
    of_items: ClassVar[bool] = True
    knows: ClassVar[tuple[Knowledge, ...]] = ("own", "exchanged", "mixed", "base")

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Learn once, then choose items for each pass.

        Raises:
            ConfigError: The backbone does not read items.
        """
        attacker.items_of(self.name)
        means, whitening = _learned(attacker)
        means = means @ whitening
        prior = (attacker.popularity.double() + 1).log()
        guesses = []
        for own in seen:
            misses = torch.cdist(own.states.cpu().double() @ whitening, means)  # (T, N)
            scores = prior - misses.square() / 2
            tokens = scores.argmax(dim=-1).tolist()
            if own.length <= len(prior):
                tokens = linear_sum_assignment(scores.numpy(), maximize=True)[1].tolist()
            guesses.append(Guess(tuple(tokens)))
        return guesses


def _learned(attacker: Attacker) -> tuple[Tensor, Tensor]:
    """Learn where each item's state is expected, (N, D), and a square root of the inverse of Σ, (D, D)."""
    replica = attacker.replica
    alone = replica.crossing(replica.vocabulary()[:, None])[:, 0].cpu().double()  # (N, D)
    passes = list(attacker.auxiliary_passes(_PASSES))
    parts = [passes[place::_HELD_OUT] for place in range(_HELD_OUT)]
    held_out, taken = parts[0], [own for part in parts[1:] for own in part]
    tokens, states = (torch.cat(own) for own in zip(*taken, strict=True))
    entering, shift = alone[tokens], states.double() - alone[tokens]  # (M, D)
    centre, mean = entering.mean(dim=0), shift.mean(dim=0)
    centred = entering - centre
    gram, both = centred.t() @ centred, centred.t() @ (shift - mean)
    size = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    tokens, states = (torch.cat(own) for own in zip(*held_out, strict=True))

    def expected(ridge: float) -> tuple[Tensor, Tensor]:
        """Place items, and say how far held-out states lie from where they are expected: (N, D), (M, D)."""
        means = alone + mean + (alone - centre) @ torch.linalg.solve(gram + ridge * size, both)
        return means, states.double() - means[tokens]

    means, left = min((expected(ridge) for ridge in _RIDGES), key=lambda own: float(own[1].square().sum()))
    covariance = torch.from_numpy(ledoit_wolf(left.numpy(), assume_centered=True)[0])
    values, directions = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + _FLOOR * values.mean() + torch.finfo(values.dtype).tiny
    return means, (directions * values.rsqrt()) @ directions.t()
