"""Federated averaging."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from pplr.federation.methods.base import Method, Mixing, RoundView, register

__all__ = ["FedAvg"]


@register
class FedAvg(Method):
    r"""Every client goes on with the same average.

    θ' = Σ_j n_j θ_j / Σ_j n_j, or the plain mean with uniform weighting.

    Cites:
        mcmahan2017fedavg
    """

    name: ClassVar[str] = "fedavg"
    shared: ClassVar[bool] = True

    def mixing(self, view: RoundView) -> Mixing:
        """Weigh clients by their samples, or all the same."""
        counts = np.asarray(view.samples, dtype=np.float64)
        if self.config.weighting == "uniform":
            counts = np.ones_like(counts)
        return Mixing(weights=np.tile(counts / counts.sum(), (len(counts), 1)))
