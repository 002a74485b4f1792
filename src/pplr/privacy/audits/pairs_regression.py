"""Learn what a client's projection does from public histories and their states, and turn it back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from pplr.privacy.audits.base import Attacker, Audit, Guess, Knowledge, register
from pplr.privacy.observing import Observation

__all__ = ["PairsRegression"]

_RIDGES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
"""Weights of a small map, as shares of the states' variance; histories that are held out choose one."""
_HELD_OUT = 4
"""One history in so many is held out."""
_BEST = 10


@register
class PairsRegression(Audit):
    r"""x_t = argmax_i cos(W h_t + b, v_i), with W and b by ridge regression from states to the public vectors of items.

    A secret projection is one linear map for all items, so states of some of them tell where all others lie: it needs
    no pair of an item to recognise it. Blocks behind the projection mix positions, which W learns to leave out.
    """

    name: ClassVar[str] = "pairs_regression"
    knows: ClassVar[tuple[Knowledge, ...]] = ("pairs",)
    of_items: ClassVar[bool] = True

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Learn once, then take each state's nearest item.

        Raises:
            ConfigError: The backbone does not read items.
        """
        vectors = attacker.items_of(self.name).vectors.cpu().double()
        passes = list(attacker.auxiliary_passes(attacker.pairs))
        held_out = passes[::_HELD_OUT] if len(passes) > 1 else passes
        taken = [own for place, own in enumerate(passes) if place % _HELD_OUT or len(passes) == 1]
        tokens, states = (torch.cat(own) for own in zip(*taken, strict=True))
        asked, given = (torch.cat(own) for own in zip(*held_out, strict=True))
        mean, centre = states.double().mean(dim=0), vectors[tokens].mean(dim=0)
        centred, wanted = states.double() - mean, vectors[tokens] - centre
        gram, both = centred.t() @ centred, centred.t() @ wanted
        size = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        units = F.normalize(vectors, dim=1)

        def scores(weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            return F.normalize((own.double() - mean) @ weights + centre, dim=1) @ units.t()

        maps = [torch.linalg.solve(gram + ridge * size, both) for ridge in _RIDGES]
        best = max(maps, key=lambda own: float((scores(own, given).argmax(dim=1) == asked).double().mean()))
        guesses = []
        for own in seen:
            found = scores(best, own.states.cpu())
            nearest = found.topk(min(_BEST, len(units)), dim=1).indices
            guesses.append(Guess(tuple(nearest[:, 0].tolist()), tuple(nearest[-1].tolist())))
        return guesses
