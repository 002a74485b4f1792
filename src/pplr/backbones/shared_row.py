"""Sequences in one row of tokens, without padding, and what all begin with once.

Blocks that look back only compute the same states for what sequences begin with alike. So these tokens stand once in
front, then the rest of each sequence: linear layers, norms and adapters see P + Σ T_i tokens as one matrix, and the
gradients of all sequences add up in what they share. Attention alone sees the sequences apart: there each is put
together again, padded on the right to S = P + max T_i.

Letters: P shared tokens, T_i more of each of B sequences, N = P + Σ T_i, S the longest sequence, d the width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

__all__ = ["Places", "SharedRow", "common_prefix", "joined", "spread"]


@dataclass(frozen=True)
class SharedRow:
    """Where sequences stand in a row.

    Args:
        prefix: P, 0 where they begin with nothing alike.
        lengths: T_i, at least 1 each.
    """

    prefix: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """N."""
        return self.prefix + sum(self.lengths)

    @property
    def longest(self) -> int:
        """S."""
        return self.prefix + max(self.lengths)

    @property
    def padded(self) -> int:
        """B · S, the places of the sequences apart."""
        return len(self.lengths) * self.longest

    def positions(self) -> Tensor:
        """Tell each token's place in its own sequence: (1, N).

        Example:
            >>> SharedRow(2, (1, 3)).positions().tolist()
            [[0, 1, 2, 2, 3, 4]]
        """
        starts = [torch.arange(self.prefix)]
        return torch.cat([*starts, *(torch.arange(own) + self.prefix for own in self.lengths)]).unsqueeze(0)


class Places:
    """The way from a row to its sequences and back, in numbers.

    Args:
        row: The layout.
        device: Where the states are.

    Attributes:
        to_row: (N,) where of B · S places each token of the row is found; what is shared, in the first sequence.
        to_sequences: (B · S,) which token of the row stands at each place; the first where padding is.
    """

    def __init__(self, row: SharedRow, device: torch.device | str) -> None:
        rows, longest, shared = len(row.lengths), row.longest, row.prefix
        own = [number * longest + shared + torch.arange(length) for number, length in enumerate(row.lengths)]
        to_row = torch.cat([torch.arange(shared), *own])
        to_sequences = torch.zeros(rows, longest, dtype=torch.long)
        to_sequences[:, :shared] = torch.arange(shared)
        to_sequences.view(-1)[to_row[shared:]] = torch.arange(shared, row.tokens)
        self.rows, self.longest, self.shared = rows, longest, shared
        self.to_row, self.to_sequences = to_row.to(device), to_sequences.view(-1).to(device)


class _Spread(torch.autograd.Function):
    """What is shared goes into every sequence, and comes back as the sum; padding tells nothing, so none comes back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        heads, tokens, width = states.shape[1:]
        flat = states.transpose(1, 2).reshape(tokens, heads * width).index_select(0, places.to_sequences)
        return flat.view(places.rows, places.longest, heads, width).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        rows, heads, longest, width = grads[0].shape
        apart = grads[0].transpose(1, 2).reshape(rows, longest, heads * width)
        own = apart.view(rows * longest, -1).index_select(0, places.to_row)
        own[: places.shared] = apart[:, : places.shared].sum(dim=0)
        return own.view(1, -1, heads, width).transpose(1, 2), None


class _Joined(torch.autograd.Function):
    """Of what is shared, the first sequence's states go on; those of the others are the same, and are let go."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return states.flatten(0, 1).index_select(0, places.to_row).unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        places: Places = ctx.places
        apart = grads[0].new_zeros(places.rows * places.longest, *grads[0].shape[2:])
        apart.index_copy_(0, places.to_row, grads[0][0])
        return apart.unflatten(0, (places.rows, places.longest)), None


def spread(states: Tensor, places: Places) -> Tensor:
    """Put sequences together again: (1, heads, N, d) -> (B, heads, S, d), padded on the right by what is finite."""
    return _Spread.apply(states, places)


def joined(states: Tensor, places: Places) -> Tensor:
    """Take sequences back into their row: (B, S, heads, d) -> (1, N, heads, d)."""
    return _Joined.apply(states, places)


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all prompts begin with alike; the last token of none is among them.

    Example:
        >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]]), common_prefix([[1, 2], [1, 2]])
        (2, 1)
    """
    alike = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(alike, min(map(len, prompts)) - 1)
