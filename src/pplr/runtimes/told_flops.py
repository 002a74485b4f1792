"""What clients tell of the operations of their training, and what a server makes of it without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

__all__ = ["SIDES", "summed_flops", "trained_rounds"]

SIDES: Final = ("client", "server", "whole")
"""Whose operations are told: those of :class:`~pplr.stages.flops.Flops`."""


def trained_rounds(records: Iterable[Mapping[str, Any]], client: str) -> list[int]:
    """List the server rounds, from 0, in which a client trained."""
    return [int(one["server_round"]) - 1 for one in records if "seconds" in one["clients"].get(client, {})]


def summed_flops(told: Sequence[Mapping[str, int] | None]) -> dict[str, int | None]:
    """Add up what clients' training took, by side; ``None`` where one of them does not tell, or there is none."""
    known = [own for own in told if own is not None]
    is_whole = bool(told) and len(known) == len(told)
    return {side: sum(own[side] for own in known) if is_whole else None for side in SIDES}
