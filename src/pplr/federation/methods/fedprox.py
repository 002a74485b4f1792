"""Federated averaging with a proximal term."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pplr.federation.methods.base import register
from pplr.federation.methods.fedavg import FedAvg
from pplr.stages.optimizer import LocalObjective

__all__ = ["FedProx"]


@register
class FedProx(FedAvg):
    r"""FedAvg whose clients are pulled towards the adapter that the round began with.

    min_θ L_i(θ) + μ/2 ‖θ − θ_round‖²

    Cites:
        li2020fedprox
    """

    name: ClassVar[str] = "fedprox"

    def objective(self) -> LocalObjective:
        """Add the proximal term."""
        return replace(super().objective(), proximal_mu=self.config.proximal_mu)
