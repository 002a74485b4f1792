"""The secret randomness: the right distributions, the same from the same key, and another from another."""

from __future__ import annotations

import sys

import numpy as np
from scipy.stats import kstest

from pplr.errors import ConfigError
from pplr.privacy.coins import SecretCoins
from pplr.testing import refuses

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))


def test_uniform_numbers_are_uniform_and_open():
    drawn = SecretCoins(KEY).uniform(100_000)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert kstest(drawn, "uniform").pvalue > 1e-3


def test_normal_numbers_are_standard_normal():
    drawn = SecretCoins(KEY).gaussian((200, 500))
    assert drawn.shape == (200, 500)
    assert drawn.dtype == np.float64
    assert kstest(drawn.ravel(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(drawn.ravel()[:-1], drawn.ravel()[1:])[0, 1]) < 0.02


def test_the_extremes_of_the_key_stream_are_finite(monkeypatch):
    coins = SecretCoins(KEY)
    monkeypatch.setattr(coins, "_words", lambda count: np.array([0, 2**64 - 1], dtype=np.uint64))
    drawn = coins.gaussian((2,))
    assert np.isfinite(drawn).all()
    assert drawn[0] == -drawn[1]
    assert drawn[1] > 8


def test_the_same_key_gives_the_same_and_another_another():
    first, again, other = SecretCoins(KEY), SecretCoins(KEY), SecretCoins(OTHER)
    assert (first.gaussian((50,)) == again.gaussian((50,))).all()
    assert first.seed() == again.seed()
    assert not (first.uniform(50) == other.uniform(50)).any()
    assert not (first.uniform(50) == first.uniform(50)).any()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with refuses(ConfigError, "privacy"):
        SecretCoins(KEY)
