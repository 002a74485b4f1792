"""Take the output stage to what the server sends back, and read which target it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch

from pplr.backbones.causal_lm import CausalLM
from pplr.privacy.audits.answers import Answers
from pplr.privacy.audits.base import Attacker, Audit, Guess, register
from pplr.privacy.audits.logit_lens import scores_of
from pplr.privacy.observing import Observation

__all__ = ["LabelLens"]

_BEST = 10


@register
class LabelLens(Audit):
    """argmax_c log p(c | h), with h what the server sends back.

    It tells how much of the target the prediction tells, and needs no gradient: the better a recommender, the more it
    finds. Where the backbone reads items, the last state ranks the catalog. Where it reads text, each title
    is judged by how far, in the mean over its answer's tokens at the last positions of the pass, each token's
    log-probability is below that of the likeliest there; so titles of more tokens lose nothing by words that no model
    could foresee. The states have read the true answer up to their own token, as in training, which helps the attacker.

    Cites:
        nostalgebraist2020logitlens
    """

    name: ClassVar[str] = "label_lens"
    looks_at: ClassVar[Literal["first", "second"]] = "second"

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess the target of each pass."""
        answers = None if attacker.reads_items else Answers(attacker)
        return [_guess(own, attacker, answers) for own in seen]


@torch.no_grad()
def _guess(own: Observation, attacker: Attacker, answers: Answers | None) -> Guess:
    """Rank the catalog by what the states say that predict the target."""
    replica = attacker.replica
    if answers is None:
        states = replica.leave(own.returned[None, -1:], own.returned[:-1])
        scores = scores_of(replica, states[0])[0]
        return Guess(targets=tuple(scores.topk(min(_BEST, len(scores))).indices.tolist()))
    chosen = answers.fitting(own.length)
    if len(chosen) == 0:
        return Guess()
    width = int(answers.lengths[chosen].max())
    tokens = answers.tokens(chosen, width)  # (S, W)
    states = replica.leave(own.returned[None, -1 - width : -1], own.returned[: -1 - width])
    logits = cast(CausalLM, replica.backbone).logits(states)[0].float().cpu()  # (W, V)
    below = logits - logits.max(dim=-1, keepdim=True).values
    said = below[torch.arange(width), tokens.clamp(min=0)].masked_fill(tokens < 0, 0.0)  # (S, W)
    means = said.sum(dim=1) / answers.lengths[chosen]
    best = means.topk(min(_BEST, len(means))).indices
    return Guess(targets=tuple(answers.items[chosen[best]].tolist()))
