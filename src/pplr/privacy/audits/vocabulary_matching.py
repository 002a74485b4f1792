"""Try tokens from left to right and keep the one whose state is nearest to what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pplr.privacy.audits.base import Attacker, Audit, Guess, Knowledge, register
from pplr.privacy.observing import Observation

__all__ = ["VocabularyMatching", "guess_of", "nearest_pairs"]

_SHORT = 512


@register
class VocabularyMatching(Audit):
    """x_t = argmin_v ‖f(x_1 … x_{t-1} v)_t − h_t‖.

    A decoder's state depends on what came before alone, so tokens fall one after the other. Each position tries the
    candidates that a learned map finds most likely; where tokens are items, all of them in the end, unless one is as
    near as the right one would be. Where the attacker has no weights, it takes the token of the nearest state among
    those of auxiliary text.

    Cites:
        thomas2025hidden
    """

    name: ClassVar[str] = "vocabulary_matching"
    knows: ClassVar[tuple[Knowledge, ...]] = ("own", "exchanged", "mixed", "base", "pairs")

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess token after token."""
        if attacker.knowledge == "pairs":
            return nearest_pairs(seen, attacker)
        shortlist, vocabulary = attacker.shortlist, attacker.replica.vocabulary()
        count = len(vocabulary) if attacker.reads_items else _SHORT

        def proposing(own: Observation) -> Callable[[int, tuple[int, ...]], Tensor]:
            ranked = shortlist.of(own.states)
            return lambda position, before: ranked(position, vocabulary, count)

        return [guess_of(attacker, own, proposing(own)) for own in seen]


def guess_of(attacker: Attacker, own: Observation, propose: Callable[[int, tuple[int, ...]], Tensor]) -> Guess:
    """Walk one pass from left to right; once the attacker's time is up, take what is most promising and run nothing."""
    began, tokens = time.monotonic(), list[int]()
    for order, _ in attacker.replica.walk(own.states, attacker.known(own.length), propose):
        tokens.append(int(order[0]))
        if attacker.seconds is not None and time.monotonic() - began >= attacker.seconds:
            break
    for position in range(len(tokens), own.length):
        tokens.append(int(propose(position, tuple(tokens))[0]))
    return Guess(tuple(tokens))


def nearest_pairs(seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
    """Take the token of the nearest state of auxiliary text, at each position by itself."""
    tokens, states = attacker.auxiliary_pairs(attacker.pairs)
    guesses = []
    for own in seen:
        far = torch.cdist(own.states.cpu(), states)  # (T, M)
        near = tokens[far.argmin(dim=-1)]
        guesses.append(Guess((*attacker.prefix, *near[len(attacker.prefix) :].tolist())[: own.length]))
    return guesses
