"""A trie of the catalog's titles in tokens, and the beam search that cannot leave it.

Nodes are numbered level by level, the root 0, children in the order of their tokens. So the children of a node are
neighbours, edge e leads to node e + 1, and the trie is a few flat arrays (CSR). A title may end inside another
("Alien" in "Aliens"): its end is then one of the node's continuations.

Shapes: N items, S different titles, R rows (the users of a batch, each with its beams), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from pplr.errors import DataError

__all__ = ["TitleTrie", "TrieConstraint", "generated_titles"]

_OUTSIDE, _ENDED = -1, -2
_EMPTY_BEAM = -1e5  # transformers gives beams that hold nothing about -1e9, divided by the length penalty


class TitleTrie:
    """All titles of a catalog as token sequences.

    Items whose titles have the same tokens share one title; generating it means all of them.

    Args:
        token_ids: The tokens of each item's title, N sequences in catalog order, exactly as training writes them.
            One end token at the very end is allowed and dropped.
        end_token: The token that ends an answer.

    Attributes:
        end_token: The token that ends an answer.
        max_length: Tokens of the longest title, without the end token: a search must be allowed one more.
        title_of: (N,) the number of each item's title, 0 to S - 1.

    Raises:
        DataError: There is no item, a title has no tokens, or the end token is inside one.

    Example:
        >>> trie = TitleTrie([[5, 6], [5], [5, 6]], end_token=0)
        >>> trie.allowed([5]), trie.items([5, 6]), trie.items([6])
        (array([0, 6]), (0, 2), ())
    """

    def __init__(self, token_ids: Sequence[Sequence[int]], end_token: int) -> None:
        self.end_token = int(end_token)
        titles, self.title_of = _unique(token_ids, self.end_token)  # (S, max_length) padded by -1, (N,)
        lengths = (titles >= 0).sum(axis=1)
        self.max_length = int(titles.shape[1])
        self._item_order = np.argsort(self.title_of, kind="stable")
        self._item_starts = np.searchsorted(self.title_of[self._item_order], np.arange(len(titles) + 1))

        tokens, parents = [np.array([-1])], [np.array([-1])]
        node_of_row = np.zeros(len(titles), dtype=np.int64)  # where each title's walk has come to
        leaf_of_title = np.zeros(len(titles), dtype=np.int64)
        node_count, changed = 1, np.zeros(len(titles), dtype=np.bool_)
        changed[0] = True
        for depth in range(self.max_length):
            changed[1:] |= titles[1:, depth] != titles[:-1, depth]
            reaches = lengths > depth
            opens = changed & reaches  # sorted titles: a new prefix opens a new node
            tokens.append(titles[opens, depth])
            parents.append(node_of_row[opens])
            node_of_row[reaches] = node_count - 1 + np.cumsum(opens)[reaches]
            node_count += int(opens.sum())
            leaf_of_title[lengths == depth + 1] = node_of_row[lengths == depth + 1]
        self._edge_tokens = np.concatenate(tokens)[1:]  # (nodes - 1,)
        self._parents = np.concatenate(parents)  # (nodes,)
        self._starts = np.searchsorted(self._parents[1:], np.arange(node_count + 1))  # (nodes + 1,)
        self._stride = int(self._edge_tokens.max()) + 1
        self._edge_keys = self._parents[1:] * self._stride + self._edge_tokens  # ascending
        self._leaves = leaf_of_title  # (S,)
        self._title_at = np.full(node_count, -1, dtype=np.int64)
        self._title_at[leaf_of_title] = np.arange(len(titles))
        self._titles_below = np.bincount(self._upwards(leaf_of_title), minlength=node_count)

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def largest_token(self) -> int:
        """The largest token that a title or the end needs."""
        return max(self._stride - 1, self.end_token)

    def allowed(self, prefix: Sequence[int]) -> NDArray[np.int64]:
        """List what may follow a prefix, in ascending order.

        After a whole title the end token is among it; after the end, or outside the trie, it is all there is.
        """
        _, tokens = self._continuations(np.asarray(prefix, dtype=np.int64).reshape(1, -1))
        return np.sort(tokens)

    def items(self, sequence: Sequence[int]) -> tuple[int, ...]:
        """Find all items with this title, in catalog order; none when it is no whole title.

        What follows the first end token is ignored.
        """
        tokens = np.asarray(sequence, dtype=np.int64)
        ends = np.flatnonzero(tokens == self.end_token)
        node = int(self._walk(tokens[None, : ends[0] if ends.size else None])[0])
        if node < 0 or self._title_at[node] < 0:
            return ()
        return self.items_at(node)

    # -- node by node -----------------------------------------------------------------------------------------

    def children(self, node: int) -> NDArray[np.int64]:
        """List the nodes that follow one; the root is 0."""
        return np.arange(self._starts[node], self._starts[node + 1]) + 1

    def parent(self, node: int) -> int:
        """Return the node before one, -1 before the root."""
        return int(self._parents[node])

    def ends(self, node: int) -> bool:
        """Tell whether a title ends with a node."""
        return bool(self._title_at[node] >= 0)

    def tokens_to(self, nodes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token that leads to each node, none of them the root; for -1, the end token."""
        chosen = np.asarray(nodes, dtype=np.int64)
        return np.where(chosen < 0, self.end_token, self._edge_tokens[chosen - 1])

    def items_at(self, node: int) -> tuple[int, ...]:
        """List the items whose title ends with a node, in catalog order."""
        title = self._title_at[node]
        return tuple(self._item_order[self._item_starts[title] : self._item_starts[title + 1]].tolist())

    # -- all prefixes at once ---------------------------------------------------------------------------------

    def _walk(self, prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Follow (R, T) prefixes from the root to (R,) nodes, or to outside or beyond the end."""
        nodes = np.zeros(len(prefixes), dtype=np.int64)
        for column in prefixes.T:
            keys = nodes * self._stride + column
            places = np.minimum(np.searchsorted(self._edge_keys, keys), len(self._edge_keys) - 1)
            known = (self._edge_keys[places] == keys) & (column >= 0) & (column < self._stride)
            ended = (nodes == _ENDED) | ((nodes >= 0) & (column == self.end_token))
            nodes = np.where(ended, _ENDED, np.where((nodes >= 0) & known, places + 1, _OUTSIDE))
        return nodes

    def _continuations(
        self, prefixes: NDArray[np.int64], closed: _Closed | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """List the allowed (row, token) pairs of (R, T) prefixes."""
        nodes = self._walk(prefixes)
        inside = np.flatnonzero(nodes >= 0)
        starts = self._starts[nodes[inside]]
        counts = self._starts[nodes[inside] + 1] - starts
        rows = np.repeat(inside, counts)
        edges = np.arange(len(rows)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
        ends = inside[self._title_at[nodes[inside]] >= 0]
        if closed is not None:
            open_edges = ~closed.holds(rows, edges + 1)
            rows, edges = rows[open_edges], edges[open_edges]
            ends = ends[~closed.holds(ends, nodes[ends], as_title=True)]
        without = np.ones(len(prefixes), dtype=np.bool_)
        without[rows] = without[ends] = False
        ends = np.concatenate([ends, np.flatnonzero(without)])
        tokens = np.concatenate([self._edge_tokens[edges], np.full(len(ends), self.end_token)])
        return np.concatenate([rows, ends]), tokens

    def _upwards(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """List every node on the way from each node to the root, both included."""
        visited = []
        while nodes.size:
            visited.append(nodes)
            nodes = self._parents[nodes]
            nodes = nodes[nodes >= 0]
        return np.concatenate(visited) if visited else nodes

    def closed_by(self, items: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find the nodes below which, and at which, no title with another item is left."""
        seen = np.unique(np.asarray(items, dtype=np.int64))
        if seen.size and (seen[0] < 0 or seen[-1] >= len(self.title_of)):
            raise DataError(
                f"item {seen[0] if seen[0] < 0 else seen[-1]} is not among the trie's {len(self.title_of)}",
                cure="Build the trie from the catalog that the histories are about.",
            )
        titles, counts = np.unique(self.title_of[seen], return_counts=True)
        titles = titles[counts == np.diff(self._item_starts)[titles]]
        leaves = np.sort(self._leaves[titles])
        nodes, counts = np.unique(self._upwards(leaves), return_counts=True)
        return nodes[counts == self._titles_below[nodes]], leaves


class _Closed:
    """What each user of a batch may no longer be told."""

    def __init__(self, trie: TitleTrie, exclude: Sequence[Sequence[int]]) -> None:
        self.users, self._nodes = np.arange(len(exclude)), len(trie._parents)
        self.beams = 1
        found = [trie.closed_by(items) for items in exclude]
        none = [np.zeros(0, dtype=np.int64)]
        self._below = np.concatenate([nodes + user * self._nodes for user, (nodes, _) in enumerate(found)] or none)
        self._at = np.concatenate([nodes + user * self._nodes for user, (_, nodes) in enumerate(found)] or none)

    def holds(self, rows: NDArray[np.int64], nodes: NDArray[np.int64], *, as_title: bool = False) -> NDArray[np.bool_]:
        """Say for each row whether its user's node is closed, with all below it or (as a title) alone."""
        keys, wanted = (self._at if as_title else self._below), self.users[rows // self.beams] * self._nodes + nodes
        if not keys.size:
            return np.zeros(len(rows), dtype=np.bool_)
        return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted


class TrieConstraint(LogitsProcessor):
    """Keep ``generate`` of transformers inside the trie, so that only real titles come out.

    Allowed tokens keep their scores, so that a beam's score is the model's own log-probability of its title; all
    others become -inf. After a whole title the end token is allowed, after the end only the end token. A user for
    whom every title is excluded gets an empty answer.

    Args:
        trie: The catalog's titles.
        prompt_length: Tokens of the padded prompt, after which the title begins.
        num_beams: Rows of each user, which follow one another; or 1 before the beams part.
        exclude: For each user of the batch, items not to be told again (the history). A title is left out when all
            its items are among them, and stays when another item shares it.

    Raises:
        DataError: The rows or the vocabulary do not fit, or an excluded item is outside the catalog.
    """

    def __init__(
        self, trie: TitleTrie, prompt_length: int, num_beams: int = 1, exclude: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._trie, self._prompt_length, self._num_beams = trie, prompt_length, num_beams
        self._closed = None if exclude is None else _Closed(trie, exclude)

    def keep(self, users: Tensor) -> None:
        """Go on with these of the users so far, by their numbers among them."""
        if self._closed is not None:
            self._closed.users = self._closed.users[users.cpu().numpy()]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Mask (R, V) scores after (R, T) tokens, of which the prompt is the first part."""
        if self._closed is not None:
            users = len(self._closed.users)
            if len(input_ids) not in (users, users * self._num_beams):
                raise DataError(
                    f"{len(input_ids)} rows are generated, and items are excluded for {users * self._num_beams}",
                    cure="Give exclude one entry for each user, and num_beams as generate gets it.",
                )
            self._closed.beams = len(input_ids) // users
        if self._trie.largest_token >= scores.shape[-1]:
            raise DataError(
                f"the titles need token {self._trie.largest_token} of a vocabulary of {scores.shape[-1]}",
                cure="Tokenise the titles with the model's own tokenizer.",
            )
        prefixes = input_ids[:, self._prompt_length :].cpu().numpy()
        rows, tokens = (
            torch.from_numpy(part).to(scores.device) for part in self._trie._continuations(prefixes, self._closed)
        )
        masked: Any = torch.full_like(scores, -torch.inf)
        masked[rows, tokens] = scores[rows, tokens]
        return masked


def generated_titles(
    trie: TitleTrie, sequences: Tensor, scores: Tensor, prompt_length: int, batch_size: int
) -> list[list[tuple[tuple[int, ...], float]]]:
    """Read the titles and their scores out of what a constrained beam search returned.

    Beams that hold nothing (there were fewer titles left than beams) are dropped, and so are unfinished ones.

    Args:
        trie: The catalog's titles.
        sequences: (R, T) tokens, prompt included; R is ``batch_size`` times the sequences returned for each user.
        scores: (R,) ``sequences_scores`` of ``generate``. With ``length_penalty=0.0`` they are the log-probabilities
            of title and end token.
        prompt_length: Tokens of the padded prompt.
        batch_size: Users of the batch.

    Returns:
        For each user, the items of each title and its score, best first. Items masked by ``exclude`` are still
        among those of a title that another item shares.
    """
    told: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(batch_size)]
    returned = len(sequences) // batch_size
    for row, (tokens, score) in enumerate(zip(sequences[:, prompt_length:].tolist(), scores.tolist(), strict=True)):
        ended = trie.end_token in tokens
        items = trie.items(tokens) if ended and score > _EMPTY_BEAM else ()
        own = told[row // returned]
        if items and items not in [known for known, _ in own]:
            own.append((items, score))
    return [sorted(own, key=lambda beam: -beam[1]) for own in told]


def _unique(token_ids: Sequence[Sequence[int]], end_token: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sort the different sequences into (S, T), padded by -1, and number each item's: (N,)."""
    if not len(token_ids):
        raise DataError("a trie of no titles allows nothing", cure="Give a catalog with at least one item.")
    rows = [list(tokens[:-1] if len(tokens) and tokens[-1] == end_token else tokens) for tokens in token_ids]
    for item, row in enumerate(rows):
        if not row or end_token in row or min(row) < 0:
            raise DataError(
                f"the title of item {item} has the tokens {row[:10]}, not some without the end token {end_token}",
                cure="Give every item a title, and leave special tokens out of it.",
            )
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), lengths.max()), -1, dtype=np.int64)
    padded[np.arange(padded.shape[1])[None] < lengths[:, None]] = np.concatenate(rows)
    order = np.lexsort(padded.T[::-1])
    new = np.ones(len(rows), dtype=np.bool_)
    new[1:] = (padded[order[1:]] != padded[order[:-1]]).any(axis=1)
    title_of = np.empty(len(rows), dtype=np.int64)
    title_of[order] = np.cumsum(new) - 1
    return padded[order[new]], title_of
