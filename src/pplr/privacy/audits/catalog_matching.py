"""Try what the catalog allows: its items, or its titles as a trie of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.data.prompts import shown_title
from pplr.privacy.audits.base import Attacker, Audit, Guess, register
from pplr.privacy.audits.vocabulary_matching import guess_of
from pplr.privacy.observing import Observation

__all__ = ["CatalogMatching"]

_SHORT = 512
_LEAD = 4
"""Known tokens in which the first title's quote may begin."""
_LONGEST = 64
"""Tokens that are looked back for the beginning of a title."""

_Node = dict[int, "_Node"]
Ranked = Callable[[int, Tensor, int], Tensor]


@register
class CatalogMatching(Audit):
    """Matching from left to right among what a recommender's passes can hold, which is the recommender's own weakness.

    A history is a row of titles of a public catalog. After each token only those that continue a title, or what stands
    between titles, are tried; where the backbone reads items, the catalog's items.
    """

    name: ClassVar[str] = "catalog_matching"

    def attack(self, seen: Sequence[Observation], attacker: Attacker) -> list[Guess]:
        """Guess token after token, among those that the catalog allows."""
        shortlist, vocabulary = attacker.shortlist, attacker.replica.vocabulary()
        grammar = None if attacker.reads_items else _Grammar(cast(CausalLM, attacker.replica.backbone), attacker)
        guesses = []
        for own in seen:
            ranked = shortlist.of(own.states)

            def propose(position: int, before: tuple[int, ...], ranked: Ranked = ranked) -> Tensor:
                allowed = vocabulary if grammar is None else grammar.allowed(before)
                return ranked(position, allowed, len(allowed) if attacker.reads_items else _SHORT)

            guesses.append(guess_of(attacker, own, propose))
        return guesses


class _Grammar:
    """Which tokens may follow: within a title those that continue one, at its end those that follow any title.

    Titles are cut into tokens as prompts and answers hold them, with what may stand before and after them, since that
    can be of one token with a title's first or last letter.
    """

    def __init__(self, backbone: CausalLM, attacker: Attacker) -> None:
        template, tokenizer = backbone.template, backbone.tokenizer
        self._from = max(0, len(attacker.prefix) - _LEAD)
        titles = list(dict.fromkeys(shown_title(title) for title in attacker.catalog.titles))
        self._trie: _Node = {}
        self._end = torch.tensor([backbone.end_token])
        if template.is_list:
            for title in titles:
                self._add(backbone.answer_tokens(title))
            return
        after = template.prompt(["x"]).rsplit('"', 1)[1]
        firsts, closings = ('"', ' "', ', "', '", "'), (f'"{after}', '", "', '"\n')
        for first, closing in itertools.product(firsts, closings):
            texts = [f"{first}{title}{closing}" for title in titles]
            for row in tokenizer(texts, add_special_tokens=False).input_ids:
                self._add(row)

    def _add(self, row: Sequence[int]) -> None:
        node = self._trie
        for token in row:
            node = node.setdefault(token, {})

    def allowed(self, before: tuple[int, ...]) -> Tensor:
        """List what may follow: what continues what was recovered from some place on, or a new title."""
        found = dict.fromkeys(self._trie)
        own = before[self._from :]
        for start in range(max(0, len(own) - _LONGEST), len(own)):
            node: _Node | None = self._trie
            for token in own[start:]:
                node = None if node is None else node.get(token)
            if node:
                found |= dict.fromkeys(node)
        return torch.cat([torch.tensor(list(found), dtype=torch.long), self._end])
