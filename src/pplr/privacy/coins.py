"""Randomness that only the client can draw, and can draw again: ChaCha20 with a secret key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri

from pplr.errors import ConfigError

__all__ = ["SecretCoins"]


class SecretCoins:
    """Numbers from the key stream of ChaCha20; the same key gives the same numbers, and nobody else can tell them.

    Uniform numbers are multiples of 2^-52 and a half, and normal ones are what the inverse of the normal distribution
    makes of them, in float64: at most 8.2 standard deviations, and not every float can come out.

    Args:
        key: 32 secret bytes, used for one stream only.

    Raises:
        ConfigError: The package that encrypts is not installed.

    Example:
        >>> SecretCoins(bytes(32)).seed() == SecretCoins(bytes(32)).seed()
        True
    """

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        except ImportError as error:
            raise ConfigError(
                "private training needs the package cryptography, which is not installed",
                cure="Install it: pip install 'pplr[privacy]'.",
            ) from error
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def _words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Draw numbers between 0 and 1, neither of them included: (count,)."""
        return np.asarray(((self._words(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)

    def gaussian(self, shape: Sequence[int]) -> NDArray[np.float64]:
        """Draw standard normal numbers of a shape."""
        return np.asarray(ndtri(self.uniform(math.prod(shape))), dtype=np.float64).reshape(tuple(shape))

    def exponential(self, count: int, width: int, rate: float) -> NDArray[np.float64]:
        """Draw vectors of density proportional to exp(-rate ‖z‖): an even direction, a Gamma(D, 1/rate) length.

        Args:
            count: How many.
            width: D.
            rate: η.

        Returns:
            (count, width).

        Cites:
            feyisetan2020metric
        """
        directions = self.gaussian((count, width))
        lengths = gammaincinv(width, self.uniform(count)) / rate
        return np.asarray(directions * (lengths / np.linalg.norm(directions, axis=1))[:, None])

    def seed(self) -> int:
        """Draw a seed in [0, 2^63)."""
        return int(self._words(1)[0]) >> 1
