"""Where a run finds the server that hosts its middle blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["StageServerAt"]


@dataclass(frozen=True)
class StageServerAt:
    """Where the middle blocks are hosted, and by which certificates clients are let in.

    Args:
        kit: A startup kit of the federation, or a folder of kits, one for each client and named as the client.
        address: ``host:port``; the kit's own when absent.
    """

    kit: Path
    address: str | None = None
