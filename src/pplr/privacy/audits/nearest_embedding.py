"""Take each state for the token whose embedding it resembles most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F

from pplr.privacy.audits.base import Attacker, Audit, Guess, register
from pplr.privacy.observing import Observation

__all__ = ["NearestEmbedding"]


@register
class NearestEmbedding(Audit):
    """argmax_v cos(h_t, e_v): exact before the first block, and ever weaker behind it."""

    name: ClassVar[str] = "nearest_embedding"

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess each token by itself."""
        vocabulary = attacker.replica.vocabulary()
        table = F.normalize(attacker.replica.embeddings(vocabulary), dim=-1)  # (V, D)
        guesses = []
        for own in seen:
            scores = F.normalize(own.states.to(table), dim=-1) @ table.t()  # (T, V)
            guesses.append(Guess(tuple(vocabulary[scores.argmax(dim=-1).cpu()].tolist())))
        return guesses
