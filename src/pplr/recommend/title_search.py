"""Beam search over the catalog's titles, in which the model runs no token twice and many at once.

It finds what :func:`~pplr.recommend.beam_search.search` finds within a
:class:`~pplr.recommend.trie.TrieConstraint`, with scores that are sums of log-probabilities: step by step the best W
prefixes of each user. But a beam is a node of the trie, and what the model says after a node never changes. So a pass
runs the nodes that the next step needs and, where there is room, those that later steps are likely to need: the rest of
a title that nothing else continues, or both of two titles that differ in their last word. Steps whose nodes were run
need no pass. Of the vocabulary only what may follow is looked at.

Letters: B users, W beams, T tokens of a pass for each user, V vocabulary.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pplr.backbones.causal_lm import CausalLM
from pplr.errors import DataError
from pplr.recommend.decoding import TokenTree
from pplr.recommend.trie import TitleTrie
from pplr.stages.client_model import ClientModel

__all__ = ["TitleBeam", "search_titles", "walk_titles"]

_PASS_TOKENS = 96
"""Tokens that a pass may have over all users for the sake of later steps: so few cost little more than one."""
_SHARE = 4
"""New users enter when one of so many places is free, so that they are not run one at a time."""
_LEAST_SHARE = 0.2
"""How likely a node has to be needed to be run before it is."""
_HEAD_ROWS = 64
"""States whose logits are held at once."""

TitleBeam = tuple[tuple[int, ...], float]
"""The items of a title, and the log-probability of title and end token."""


@dataclass
class _Told:
    """What the model says after a node: what may follow, (M,) nodes or -1 for the end, and its log-probabilities."""

    nodes: NDArray[np.int64]
    odds: NDArray[np.float64]


@dataclass
class _Walk:
    """One user's search.

    Args:
        trie: The titles.
        width: W.
        below: Nodes below which nothing is left to tell.
        at: Nodes whose own title is not to be told.
        ahead: Nodes that may still be run before a step needs them.
        beams: The best prefixes, best first: node and log-probability.
        found: The best titles that ended, best first.
        told: By node, of those that were run.
        slots: By node, where it is in the user's row.
    """

    trie: TitleTrie
    width: int
    below: frozenset[int]
    at: frozenset[int]
    ahead: int
    beams: list[tuple[int, float]] = field(default_factory=lambda: [(0, 0.0)])
    found: list[tuple[int, float]] = field(default_factory=list)
    told: dict[int, _Told] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)

    def follows(self, node: int) -> NDArray[np.int64]:
        """List what may follow a node: nodes, and -1 for the end."""
        nodes = self.trie.children(node)
        if self.below:
            nodes = nodes[[int(child) not in self.below for child in nodes]]
        return np.append(nodes, -1) if self.trie.ends(node) and node not in self.at else nodes

    def opening(self) -> list[int]:
        """List the nodes that every title left to this user begins with, in order, without the root."""
        nodes, follow = list[int](), self.follows(0)
        while len(follow) == 1 and follow[0] >= 0:
            nodes.append(int(follow[0]))
            follow = self.follows(nodes[-1])
        return nodes

    def advance(self) -> bool:
        """Take all steps whose nodes were run; say whether the search goes on."""
        while self.beams and all(node in self.told for node, _ in self.beams):
            told = [self.told[node] for node, _ in self.beams]
            nodes = np.concatenate([own.nodes for own in told])
            scores = np.concatenate([score + own.odds for (_, score), own in zip(self.beams, told, strict=True)])
            before = np.repeat([node for node, _ in self.beams], [len(own.nodes) for own in told])
            order = np.argsort(-scores, kind="stable")
            among = order[: self.width]  # only among the best W candidates is an end good enough
            ended = [(int(before[place]), float(scores[place])) for place in among if nodes[place] < 0]
            self.found = sorted(self.found + ended, key=lambda own: -own[1])[: self.width]
            order = order[nodes[order] >= 0][: self.width]
            self.beams = [(int(nodes[place]), float(scores[place])) for place in order]
            if self.beams and len(self.found) == self.width and self.beams[0][1] <= self.found[-1][1]:
                self.beams = []  # nothing that goes on can beat what ended
        return bool(self.beams)

    def needed(self) -> list[int]:
        """List the nodes that the next step needs and that were not run."""
        return [node for node, _ in self.beams if node not in self.told]

    def plan(self, room: int) -> list[int]:
        """List nodes to run, none before its parent: those that are needed, then the likeliest of the next steps.

        A node that alone follows another is as likely as that one; of several, each has its share.

        Args:
            room: Most nodes, unless more are needed.
        """
        chosen, queue = self.needed(), list[tuple[float, int, int]]()

        def look(node: int, share: float) -> None:
            follow = self.follows(node)
            if share >= _LEAST_SHARE * len(follow):
                for child in follow[follow >= 0].tolist():
                    heapq.heappush(queue, (-share / len(follow), child, node))

        for node in chosen:
            look(node, 1.0)
        while queue and len(chosen) < room and self.ahead > 0:
            share, node, _ = heapq.heappop(queue)
            chosen.append(node)
            self.ahead -= 1
            look(node, -share)
        return chosen

    def titles(self) -> list[TitleBeam]:
        """Return what was found, best first."""
        return [(self.trie.items_at(node), score) for node, score in self.found]


def search_titles(
    model: ClientModel,
    prompts: Sequence[Sequence[int]],
    trie: TitleTrie,
    *,
    beams: int,
    exclude: Sequence[Sequence[int]],
    opening: Sequence[int] = (),
) -> list[list[TitleBeam]]:
    """Find the titles that a model would most likely write after prompts, all of them in one batch.

    Args:
        model: A client's model, whose blocks take any mask (:attr:`~pplr.backbones.causal_lm.CausalLM.takes_masks`).
        prompts: B token sequences.
        trie: The catalog's titles.
        beams: W, also the most titles of each user.
        exclude: For each user, items that are not to be told; a title is left out when all its items are among them.
        opening: What every prompt begins with, whoever it is about.

    Returns:
        For each user, the items of each title and its score, best first; fewer than W where fewer titles are left.

    Raises:
        DataError: The vocabulary does not fit, or an excluded item is outside the catalog.
    """
    found = dict(walk_titles(model, prompts, trie, beams=beams, exclude=exclude, opening=opening, places=len(prompts)))
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def walk_titles(
    model: ClientModel,
    prompts: Sequence[Sequence[int]],
    trie: TitleTrie,
    *,
    beams: int,
    exclude: Sequence[Sequence[int]],
    opening: Sequence[int] = (),
    places: int,
) -> Iterator[tuple[int, list[TitleBeam]]]:
    """Find titles as :func:`search_titles` does, of users who wait in a queue until there is a place for them.

    Whoever is done leaves; once a quarter of the places is free, those who are next are run and join those who are
    still there.

    Args:
        model: As there, and so are the others but the last.
        prompts: B token sequences.
        trie: The catalog's titles.
        beams: W.
        exclude: For each user, items that are not to be told.
        opening: What every prompt begins with.
        places: Most users at a time.

    Yields:
        A user's number among the prompts, and what was found, as soon as that is known.
    """
    backbone = model.backbone
    if not isinstance(backbone, CausalLM):
        raise TypeError(f"only causal_lm generates, not {type(backbone).__name__}")
    vocabulary = int(backbone.model.lm_head.weight.shape[0])
    if trie.largest_token >= vocabulary:
        raise DataError(
            f"the titles need token {trie.largest_token} of a vocabulary of {vocabulary}",
            cure="Tokenise the titles with the model's own tokenizer.",
        )
    walks = [_walk(trie, beams, items) for items in exclude]
    waiting = [number for number, walk in enumerate(walks) if len(walk.follows(0))]
    yield from ((number, []) for number, walk in enumerate(walks) if not len(walk.follows(0)))
    with ExitStack() as stack:
        tree, going = TokenTree(model, backbone, stack.enter_context(model.generation()), opening), list[int]()
        while waiting or going:
            free = places - len(going)
            if waiting and (not going or free >= min(len(waiting), max(1, places // _SHARE))):
                new, waiting = waiting[:free], waiting[free:]
                if not going and tree.is_used:
                    stack.close()
                    tree = TokenTree(model, backbone, stack.enter_context(model.generation()), opening)
                _enter(tree, backbone, [walks[number] for number in new], [prompts[n] for n in new], joins=bool(going))
                going += new
            else:
                _extend(tree, backbone, [walks[number] for number in going])
            rows = [row for row, number in enumerate(going) if walks[number].advance()]
            left = [going[row] for row in rows]
            for number in going:
                if number not in left:
                    yield number, walks[number].titles()
                    walks[number].told.clear()
            if left and len(left) < len(going):
                tree.keep(rows)
            going = left


def _walk(trie: TitleTrie, width: int, exclude: Sequence[int]) -> _Walk:
    below, at = (frozenset(nodes.tolist()) for nodes in trie.closed_by(exclude))
    return _Walk(trie, width, below, at, ahead=width * (trie.max_length + 1))


def _enter(
    tree: TokenTree, backbone: CausalLM, walks: Sequence[_Walk], prompts: Sequence[Sequence[int]], *, joins: bool
) -> None:
    """Run prompts, each with what all its user's titles begin with."""
    openings = [walk.opening() for walk in walks]
    tail = 1 + max(map(len, openings))
    written = [
        [*prompt, *walk.trie.tokens_to(opening).tolist()]
        for walk, prompt, opening in zip(walks, prompts, openings, strict=True)
    ]
    states = tree.join(written, tail) if joins else tree.begin(written, tail)
    nodes = [[0, *opening] for opening in openings]
    for walk, own in zip(walks, nodes, strict=True):
        walk.slots[own[-1]] = 0
    _learn(backbone, walks, nodes, states)


def _extend(tree: TokenTree, backbone: CausalLM, walks: Sequence[_Walk]) -> None:
    """Run what the next steps need, and as much of what may come as there is room for."""
    room = max(_PASS_TOKENS // len(walks), *(len(walk.needed()) for walk in walks))
    planned = [walk.plan(room) for walk in walks]
    longest = max(map(len, planned))
    tokens = np.full((len(walks), longest), backbone.pad_token, dtype=np.int64)
    after = np.full((len(walks), longest), -1, dtype=np.int64)
    for row, (walk, nodes) in enumerate(zip(walks, planned, strict=True)):
        first = longest - len(nodes)
        walk.slots |= {node: tree.slots + first + place for place, node in enumerate(nodes)}
        tokens[row, first:] = walk.trie.tokens_to(nodes)
        after[row, first:] = [walk.slots[walk.trie.parent(node)] for node in nodes]
    _learn(backbone, walks, planned, tree.extend(tokens, after))


def _learn(backbone: CausalLM, walks: Sequence[_Walk], nodes: Sequence[Sequence[int]], states: Tensor) -> None:
    """Read what may follow each node out of the states after it, the last of each row: (B, T, D)."""
    flat = torch.cat([own[states.shape[1] - len(run) :] for own, run in zip(states, nodes, strict=True)])
    follows = [(walk, node, walk.follows(node)) for walk, run in zip(walks, nodes, strict=True) for node in run]
    for start in range(0, len(flat), _HEAD_ROWS):
        logits = backbone.logits(flat[start : start + _HEAD_ROWS])  # (rows, V)
        part = follows[start : start + _HEAD_ROWS]
        trie, counts = part[0][0].trie, [len(follow) for _, _, follow in part]
        rows = torch.from_numpy(np.repeat(np.arange(len(part)), counts)).to(logits.device)
        tokens = torch.from_numpy(trie.tokens_to(np.concatenate([follow for _, _, follow in part])))
        wide = logits.float()
        odds = wide[rows, tokens.to(logits.device)] - torch.logsumexp(wide, dim=-1)[rows]
        for (walk, node, follow), own in zip(part, odds.cpu().split(counts), strict=True):
            walk.told[node] = _Told(follow, own.double().numpy())
