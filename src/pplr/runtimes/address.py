"""Where a run finds the server that hosts its middle blocks, and an operator the link to a federation's clients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["LinkAddress", "StageServerAt"]


@dataclass(frozen=True)
class StageServerAt:
    """Where the middle blocks are hosted, and by which certificates clients are let in.

    Args:
        kit: A startup kit of the federation, or a folder of kits, one for each client and named as the client.
        address: ``host:port``; the kit's own when absent.
    """

    kit: Path
    address: str | None = None


@dataclass(frozen=True)
class LinkAddress:
    """Where a link is, for its operator; the secret is not shown when this is printed.

    Args:
        address: HOST:PORT.
        ca_pem: The authority that signed its certificate.
        secret: Of the server's state folder.
    """

    address: str
    ca_pem: bytes
    secret: bytes = field(repr=False)
