"""Middle adapters that stay on a stage server: read there once a client has trained, offered there once mixed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.errors import IdentityError
from pplr.runtimes.identity import read_kit
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_operator import StageOperator

__all__ = ["Middles", "StageMiddles"]


class Middles(Protocol):
    """Where the server's side finds the middle adapters of its clients."""

    def read(self, client: str) -> AdapterState:
        """Read a client's middle adapter as it is now.

        Raises:
            TransportError: There is none of this client.
        """

    def offer(self, client: str, label: str, adapter: Mapping[str, Tensor]) -> None:
        """Offer a client a whole middle adapter, which it takes by the label."""


class StageMiddles:
    """Those of a stage server, by an operator's kit. A client's tenancy has the client's own name.

    Args:
        kit: The operator's startup kit.
        address: ``host:port`` of the stage server; the kit's own when absent.

    Raises:
        IdentityError: The kit is none, or a client's.
        TransportError: The server does not answer.
    """

    def __init__(self, kit: Path, address: str | None = None) -> None:
        own = read_kit(kit)
        if own.role != "operator":
            raise IdentityError(
                f"{kit} is the kit of {own.role} {own.name}", cure="Use one of `pplr enroll client NAME --operator`."
            )
        self._channel = StageChannel(address or own.address, own)
        self._operator = StageOperator(self._channel)
        self._operator.hosted()  # whether it is there, and lets this kit in

    def read(self, client: str) -> AdapterState:
        """Read a client's middle adapter as it is now."""
        return self._operator.adapter(client, client)

    def offer(self, client: str, label: str, adapter: Mapping[str, Tensor]) -> None:
        """Offer a client a whole middle adapter, which it takes by the label."""
        self._operator.offer(client, client, label, adapter)

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()
