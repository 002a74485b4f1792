"""An empirical lower bound on ε: users with random histories are put in or left out, and the adapter tells which."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from pplr.config import Config
from pplr.data.prompts import Sample
from pplr.federation.client import FederatedClient
from pplr.federation.methods import Method
from pplr.recommend.training import evaluation_loss
from pplr.stages.client_model import ClientModel

__all__ = ["CanaryAudit", "audit_client", "audit_scores", "draw_canaries", "epsilon_lower_bound"]

_SHARES = (1.0, 0.5, 0.25)
"""Shares of the canaries that are guessed, from the surest; each has its part of the error."""


@dataclass(frozen=True)
class CanaryAudit:
    """What the guesses of one training run prove.

    Args:
        canaries: Users that were put in or left out.
        guesses: Of how many it was guessed which, where the bound is best.
        correct: How many of these guesses were right.
        delta: δ at which the bound holds.
        confidence: Of the bound.
        epsilon: No training with a smaller ε gives so many right guesses, but for that confidence.
    """

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    epsilon: float


def draw_canaries(count: int, items: int, length: int, source: np.random.Generator, first_user: int) -> list[Sample]:
    """Make users who took items at random, each one sample: nothing but their own training tells their target.

    Args:
        count: How many.
        items: N, items of the catalog.
        length: Items of each, the target among them.
        source: Draws the items.
        first_user: Number of the first of them; the others follow.
    """
    walks = source.integers(0, items, size=(count, length)).tolist()
    return [Sample(first_user + number, tuple(walk[:-1]), walk[-1]) for number, walk in enumerate(walks)]


def audit_client(
    make: Callable[[Sequence[Sample]], FederatedClient],
    canaries: Sequence[Sample],
    encode: Callable[[Sequence[Sample]], list[Any]],
    config: Config,
    method: Method,
    source: np.random.Generator,
    *,
    confidence: float = 0.95,
) -> CanaryAudit:
    """Train one client once on its own samples and about half of the canaries, and guess which half from its adapter.

    What others see of the client is its adapter after mixing, which says no more than the adapter itself.

    Args:
        make: Makes the client with some canaries beside its own samples.
        canaries: One sample of each canary.
        encode: Encodes samples as training does.
        config: The run's configuration; its rounds are trained.
        method: What the adapter minimises besides the loss.
        source: Draws who is in.
        confidence: Of the bound.
    """
    included = source.random(len(canaries)) < 0.5
    client = make([canary for canary, is_in in zip(canaries, included, strict=True) if is_in])
    encoded = encode(canaries)
    before = _losses(client.model, encoded)
    for server_round in range(config.federation.rounds):
        client.begin_round(server_round)
        client.train(server_round, config, method, lambda _: None)
    scores = before - _losses(client.model, encoded)
    return audit_scores(scores, included, delta=config.privacy.dp.delta, confidence=confidence)


def _losses(model: ClientModel, encoded: Sequence[Any]) -> NDArray[np.float64]:
    """Measure the loss of each canary, (m,); one that is not finite is as good as no knowledge."""
    losses = np.array([evaluation_loss(model, [own], 1) for own in encoded], dtype=np.float64)
    return np.where(np.isfinite(losses), losses, 0.0)


def audit_scores(
    scores: NDArray[np.float64], included: NDArray[np.bool_], *, delta: float, confidence: float = 0.95
) -> CanaryAudit:
    """Guess the canaries of the highest scores in and of the lowest out, and bound ε by how many guesses are right.

    Three numbers of guesses are tried, and the error is shared among them, so that the best may be taken.

    Args:
        scores: (m,) how much each canary looks as if it had been trained on.
        included: (m,) whether it was; each drawn with probability 1/2, alone.
        delta: δ.
        confidence: Of the bound.
    """
    order = np.argsort(-scores, kind="stable")
    found: list[CanaryAudit] = []
    for share in _SHARES:
        half = max(1, int(len(scores) * share) // 2)
        correct = int(included[order[:half]].sum()) + int((~included[order[-half:]]).sum())
        each = 1 - (1 - confidence) / len(_SHARES)
        bound = epsilon_lower_bound(correct, 2 * half, len(scores), delta=delta, confidence=each)
        found.append(CanaryAudit(len(scores), 2 * half, correct, delta, confidence, bound))
    return max(found, key=lambda audit: audit.epsilon)


def epsilon_lower_bound(correct: int, guesses: int, canaries: int, *, delta: float, confidence: float) -> float:
    r"""Bound ε from below by right guesses about one training run.

    Under (ε, δ) the number of right guesses V is at most a binomial of rate e^ε / (1 + e^ε), but for δ:

    P[V ≥ v] ≤ P[B ≥ v] + 2 m δ max_i P[v > B ≥ v − i] / i

    Args:
        correct: v.
        guesses: r, at most m.
        canaries: m.
        delta: δ.
        confidence: Of the bound.

    Returns:
        The largest ε that is refuted, 0 where none is.

    Cites:
        steinke2023audit

    Example:
        >>> 2.7 < epsilon_lower_bound(50, 50, 50, delta=0.0, confidence=0.95) < 2.8
        True
        >>> epsilon_lower_bound(25, 50, 50, delta=0.0, confidence=0.95)
        0.0
    """

    def refuted(epsilon: float) -> bool:
        rate = 1 / (1 + math.exp(-epsilon))
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))  # P[v > B >= v - i], i = 1, 2, ...
        slack = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
        return float(binom.sf(correct - 1, guesses, rate)) + 2 * canaries * delta * slack < 1 - confidence

    low, high = 0.0, 20.0
    if not refuted(low):
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
