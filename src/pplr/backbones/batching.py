"""Batches whose rows have nearly the same length, in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Sequence

from pplr.seeds import generator

__all__ = ["bucketed_batches"]

_POOL = 8
"""Batches' worth of samples that are sorted by length together."""


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, seed: int, *name: str | int, pool: int = _POOL
) -> list[list[int]]:
    """Deal samples into batches: shuffled, then sorted by length within pools, then batches shuffled.

    Args:
        lengths: Tokens of each sample.
        batch_size: Samples for each batch; the last may be smaller.
        seed: The run's seed.
        name: What the order is for, such as the client and the epoch.
        pool: Batches' worth of samples that are sorted by length together.

    Returns:
        Batches of positions in ``lengths``; every position once.

    Example:
        >>> batches = bucketed_batches([5, 1, 4, 2], 2, 0, "example")
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2], [1, 3]]
    """
    random = generator(seed, "batches", *name)
    order = random.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * pool):
        near = sorted((int(i) for i in order[start : start + batch_size * pool]), key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]
