"""One seed in, independent seeds out: every draw is named, so none depends on what was drawn before it."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["derive_seed", "generator"]


def derive_seed(seed: int, *name: str | int) -> int:
    """Derive the seed of one named draw.

    Args:
        seed: The run's seed.
        name: What is drawn, for whom and when, such as ``"dropout", "client 3", 7``.

    Returns:
        An integer in [0, 2^63), the same on every machine.

    Example:
        >>> derive_seed(0, "batches", "0", 1) == derive_seed(0, "batches", "0", 1)
        True
        >>> derive_seed(0, "batches", "0", 1) == derive_seed(0, "batches", "0", 2)
        False
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in name)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *name: str | int) -> np.random.Generator:
    """Make numpy's generator for one named draw."""
    return np.random.default_rng(derive_seed(seed, *name))
