"""What an operator can ask of a stage server: who has what on it, and to read, write, save, restore or drop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pplr.backbones.adapters import AdapterState
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.stage_channel import StageChannel

__all__ = ["Hosted", "StageOperator"]

_MAX_REPLY = 1 << 30


@dataclass(frozen=True)
class Hosted:
    """One adapter on a stage server.

    Args:
        client: Whose.
        tenant: Under which name below the client's own.
        cut: Input and output layers on the client.
        rank: LoRA's rank.
        steps: Optimizer steps it took.
        in_memory: Whether it is served now.
        on_disk: Whether it was saved.
        idle_s: Since its last request.
    """

    client: str
    tenant: str
    cut: tuple[int, int]
    rank: int
    steps: int
    in_memory: bool
    on_disk: bool
    idle_s: float


class StageOperator:
    """An operator's connection.

    Args:
        channel: With an operator's kit; the server refuses a client's.
    """

    def __init__(self, channel: StageChannel) -> None:
        self._channel = channel

    def _call(
        self, name: str, kind: Any, client: str = "", tenant: str = "", tensors: Any = None, label: str = ""
    ) -> Any:
        request = pb.TenancyRequest(client=client, tenant=tenant, tensors=tensors, label=label)
        return self._channel.call(name, request, kind, max_bytes=_MAX_REPLY)

    def hosted(self) -> list[Hosted]:
        """List every adapter in memory and on disk."""
        return [
            Hosted(
                own.client, own.tenant, (own.input_layers, own.output_layers), own.rank, own.steps,
                own.in_memory, own.on_disk, own.idle_s,
            )
            for own in self._call("Tenancies", pb.TenancyList).tenancies
        ]  # fmt: skip

    def adapter(self, client: str, tenant: str) -> AdapterState:
        """Read a middle adapter."""
        told = self._call("ReadAdapter", pb.TensorsReply, client, tenant).tensors
        whose = f"{client}/{tenant}'s middle adapter"
        return codec.decode_tensors(told, None, whose=whose, max_bytes=_MAX_REPLY, max_norm=None)

    def set_adapter(self, client: str, tenant: str, state: Mapping[str, Tensor]) -> None:
        """Write a middle adapter, or some of its tensors."""
        self._call("WriteAdapter", pb.Done, client, tenant, codec.encode_tensors(state))

    def offer(self, client: str, tenant: str, label: str, state: Mapping[str, Tensor]) -> None:
        """Offer a whole middle adapter under a label; what was offered to this tenancy before is over."""
        self._call("OfferAdapter", pb.Done, client, tenant, codec.encode_tensors(state), label)

    def save(self, client: str, tenant: str) -> None:
        """Have an adapter and its optimizer written to the server's disk."""
        self._call("SaveTenancy", pb.Done, client, tenant)

    def restore(self, client: str, tenant: str) -> None:
        """Put an adapter and its optimizer back to where they were saved last."""
        self._call("RestoreTenancy", pb.Done, client, tenant)

    def dismiss(self, client: str, tenant: str) -> None:
        """Let go of an adapter in memory; what was saved of it stays."""
        self._call("DismissTenancy", pb.Done, client, tenant)

    def metrics(self) -> str:
        """Read the server's metrics, in Prometheus' text format."""
        return str(self._call("Metrics", pb.TextReply).text)
