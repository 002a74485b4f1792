"""Ditto: a personal adapter beside the averaged one."""

from __future__ import annotations

from typing import ClassVar

from pplr.federation.methods.base import register
from pplr.federation.methods.fedavg import FedAvg
from pplr.stages.optimizer import LocalObjective

__all__ = ["Ditto"]


@register
class Ditto(FedAvg):
    r"""FedAvg, and for each client a personal adapter v that is pulled towards the average and never sent.

    min_v L_i(v) + μ/2 ‖v − θ_round‖²

    Clients are served by v. Local training takes twice as long.

    Cites:
        li2021ditto
    """

    name: ClassVar[str] = "ditto"
    personal: ClassVar[bool] = True

    def personal_objective(self) -> LocalObjective:
        """Pull the personal adapter towards the average; all of it is trained, for it is never averaged."""
        return LocalObjective(proximal_mu=self.config.proximal_mu)
