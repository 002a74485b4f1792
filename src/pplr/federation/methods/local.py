"""No federation: every client trains alone."""

from __future__ import annotations

from typing import ClassVar

from pplr.federation.methods.base import Method, Mixing, RoundView, register

__all__ = ["Local"]


@register
class Local(Method):
    """Every client goes on with its own adapter; nothing is exchanged."""

    name: ClassVar[str] = "local"

    def mixing(self, view: RoundView) -> Mixing:
        """Exchange nothing."""
        return Mixing(weights=None)
