"""A round's mixing as the formulas are written: client by client, pair by pair, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.config import FederationConfig

__all__ = ["mixed_by_loops"]


def mixed_by_loops(
    states: Sequence[AdapterState], losses: Sequence[float], server_round: int, some: Sequence[int] | None = None
) -> list[AdapterState]:
    """Carry the mixing of ``pplr`` out in float64, from one snapshot.

    Args:
        states: θ of every client, in memory.
        losses: L of every client.
        server_round: t, counted from 0.
        some: Clients whose mixture is made; all when absent.

    Cites:
        zhao2024pplr
    """
    config = FederationConfig()
    if config.heating_scale is None:
        raise ValueError("heating is on by default")

    def inner(one: AdapterState, other: AdapterState) -> float:
        return sum(float((one[name].double() * other[name].double()).sum()) for name in one)

    share = np.exp(np.asarray(losses) / config.temperature - max(losses) / config.temperature)
    share = share / share.sum()
    norms = [inner(own, own) ** 0.5 for own in states]
    mixed = []
    for i in range(len(states)) if some is None else some:
        heat = np.tanh(config.heating_scale / share[i] ** (server_round + 1 / config.heating_horizon))
        weights = []
        for j, other in enumerate(states):
            cosine = inner(states[i], other) / (norms[i] * norms[j])
            weights.append((1.0 if i == j else heat) * (cosine + 1) / 2)
        made: dict[str, Tensor] = {}
        for name in states[i]:
            total = weights[0] * states[0][name].double()
            for weight, state in zip(weights[1:], states[1:], strict=True):
                total += weight * state[name].double()
            made[name] = (total / sum(weights)).float()
        mixed.append(made)
    return mixed
