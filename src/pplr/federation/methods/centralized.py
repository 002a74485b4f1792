"""The comparison that federation wants to reach: all data in one place."""

from __future__ import annotations

from typing import ClassVar

from pplr.federation.methods.base import Method, Mixing, RoundView, register

__all__ = ["Centralized"]


@register
class Centralized(Method):
    """One adapter is trained on the pooled samples of all clients and serves them all."""

    name: ClassVar[str] = "centralized"
    pooled: ClassVar[bool] = True

    def mixing(self, view: RoundView) -> Mixing:
        """Exchange nothing; there is one trainer."""
        return Mixing(weights=None)
