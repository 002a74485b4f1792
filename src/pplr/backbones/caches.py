"""Rows of keys and values moved from one cache to another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from pplr.errors import BackboneError

__all__ = ["append_rows"]


def append_rows(cache: DynamicCache, other: DynamicCache, rows: Tensor, skip: int = 0) -> None:
    """Append copies of another cache's rows; the shorter of the two is padded on the left by zeros.

    Args:
        cache: What is appended to; it may be empty. Its blocks look back without a limit.
        other: Of the same blocks. It stays as it is.
        rows: (B,) which of its rows.
        skip: How many of the first tokens of ``cache`` to let go of.

    Raises:
        BackboneError: The blocks look back a limited way; nothing was moved.
    """
    if any(getattr(layer, "is_sliding", False) for layer in (*cache.layers, *other.layers)):
        raise BackboneError(
            "rows moved between caches of blocks that look back a limited way", cure="Run what they hold again."
        )
    for number, (own, more) in enumerate(zip(cache.layers, other.layers, strict=True)):
        if more.keys is None or more.values is None:
            continue
        keys, values = more.keys.index_select(0, rows), more.values.index_select(0, rows)
        if own.keys is None or own.values is None or own.keys.numel() == 0:
            cache.update(keys, values, number)
            continue
        own.keys = _stacked(own.keys[:, :, skip:], keys)
        own.values = _stacked(own.values[:, :, skip:], values)


def _stacked(one: Tensor, other: Tensor) -> Tensor:
    """(B, heads, T, d), (B', heads, T', d) -> (B + B', heads, max(T, T'), d)."""
    longest = max(one.shape[2], other.shape[2])
    return torch.cat([pad(own, (0, 0, longest - own.shape[2], 0)) for own in (one, other)])
