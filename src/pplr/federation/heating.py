"""Curriculum heating: how far each client opens to the others in a server round."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pplr.errors import FederationError

__all__ = ["heating_weight", "loss_share"]


def loss_share(losses: Sequence[float], *, temperature: float) -> NDArray[np.float64]:
    r"""Share the round's training loss out among its clients.

    p = softmax(L / τ)

    Args:
        losses: L, mean training loss per answer token of each client, in nats, (C,).
        temperature: τ; the smaller, the more the worst client takes all.

    Returns:
        p, (C,), positive, with sum 1.

    Raises:
        FederationError: A loss is not finite.

    Cites:
        zhao2024pplr

    Example:
        >>> loss_share([2.0, 2.0], temperature=0.05).tolist()
        [0.5, 0.5]
    """
    values = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(values).all():
        raise FederationError(f"a training loss is not finite: {list(losses)}", cure="Lower training.learning_rate.")
    scaled = values / temperature
    shares = np.exp(scaled - scaled.max())
    return np.asarray(shares / shares.sum(), dtype=np.float64)


def heating_weight(
    loss_share: float, server_round: int, *, heating_scale: float | None, heating_horizon: float
) -> float:
    r"""Weigh how far one client opens to the others this round.

    w = tanh(scale / p^(t + 1/horizon))

    A client that still struggles (large p) stays with its own data longer.

    Args:
        loss_share: p, the client's softmax share of this round's training loss, in [0, 1].
        server_round: t, counted from 0.
        heating_scale: The paper's α; ``None`` turns heating off.
        heating_horizon: The paper's β.

    Returns:
        w, in (0, 1].

    Cites:
        zhao2024pplr

    Example:
        >>> round(heating_weight(0.2, 0, heating_scale=0.7, heating_horizon=5), 3)
        0.747
        >>> heating_weight(0.2, 0, heating_scale=None, heating_horizon=5)
        1.0
    """
    if heating_scale is None or loss_share <= 0:
        return 1.0
    exponent = math.log(heating_scale) - (server_round + 1 / heating_horizon) * math.log(loss_share)
    return math.tanh(math.exp(min(exponent, 5.0)))
