"""Take the model's own end to each state, and read which token it would say next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.backbones.item_vectors import ItemVectors
from pplr.privacy.audits.base import Attacker, Audit, Guess, register
from pplr.privacy.observing import Observation
from pplr.privacy.replica import Replica

__all__ = ["LogitLens", "scores_of"]


@torch.no_grad()
def scores_of(replica: Replica, states: Tensor) -> Tensor:
    """Apply norm and head, or the space of comparison: (T, D) -> (T, V)."""
    backbone = replica.backbone
    states = states.to(device=backbone.device, dtype=backbone.dtype)
    if isinstance(backbone, ItemVectors):
        return backbone.queries(states, replica.output_ends) @ backbone.items(replica.output_ends).t()
    return cast(CausalLM, backbone).logits(states).float()


@register
class LogitLens(Audit):
    """x_{t+1} = argmax_v of the head on h_t.

    Cites:
        nostalgebraist2020logitlens
    """

    name: ClassVar[str] = "logit_lens"

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess every token but the first from the state before it."""
        guesses = []
        for own in seen:
            best = scores_of(attacker.replica, own.states).topk(10 if attacker.reads_items else 1, dim=-1).indices.cpu()
            targets = tuple(best[-1].tolist()) if attacker.reads_items else None  # what comes after the last item
            guesses.append(Guess((None, *best[:-1, 0].tolist()), targets))
        return guesses
