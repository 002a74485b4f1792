"""The paper's dynamic balance strategy."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pplr.errors import FederationError
from pplr.federation.aggregation import mixing_weights, similarity
from pplr.federation.heating import heating_weight, loss_share
from pplr.federation.methods.base import Method, Mixing, RoundView, register

__all__ = ["PPLR"]


@register
class PPLR(Method):
    r"""Every client goes on with its own mixture, weighed by similarity and opened by curriculum heating.

    θ_i' = (S_ii θ_i + w_i Σ_{j≠i} S_ij θ_j) / (S_ii + w_i Σ_{j≠i} S_ij)

    Cites:
        zhao2024pplr
    """

    name: ClassVar[str] = "pplr"

    def mixing(self, view: RoundView) -> Mixing:
        """Compare adapters, share the loss, heat, weigh; without the losses nobody is heated.

        Raises:
            FederationError: There is heating, and a client does not tell its loss.
        """
        config = self.config
        alike = similarity(view.adapters, view.initial, of=config.similarity)
        losses = [loss for loss in view.losses if loss is not None]
        if len(losses) < len(view.losses):
            if config.heating_scale is not None:
                raise FederationError("heating without every client's loss", cure="Set federation.heating_scale: null.")
            return Mixing(mixing_weights(self.parts(alike, view), [1.0] * len(view.losses)), alike)
        shares = loss_share(losses, temperature=config.temperature)
        heating = np.array(
            [
                heating_weight(
                    float(share),
                    view.server_round,
                    heating_scale=config.heating_scale,
                    heating_horizon=config.heating_horizon,
                )
                for share in shares
            ]
        )
        return Mixing(mixing_weights(self.parts(alike, view), heating.tolist()), alike, shares, heating)

    def parts(self, alike: NDArray[np.float64], view: RoundView) -> NDArray[np.float64]:
        """Say what part of each client's adapter each client would take, were it not for heating: (C, C)."""
        return alike
