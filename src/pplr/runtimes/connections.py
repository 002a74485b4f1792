"""From an address and startup kits to the transports of a run's clients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pplr.backbones.base import Backbone
from pplr.config import Config
from pplr.errors import IdentityError
from pplr.runtimes.codec import Wire
from pplr.runtimes.identity import Kit, read_kit
from pplr.runtimes.stage_channel import StageChannel
from pplr.runtimes.stage_client import GrpcTransport
from pplr.stages.cut import CutPlan
from pplr.stages.transport import Transport

__all__ = ["Connections"]


class Connections:
    """The connections of one process to a stage server.

    With one kit every client of this process is a tenancy below that kit's name. With a folder of kits, one for each
    client and named as the client, each client connects by its own certificate.

    Args:
        kit: A startup kit, or a folder of kits.
        address: ``host:port`` of the stage server; the kit's own when absent.

    Raises:
        IdentityError: There is no usable kit.
    """

    def __init__(self, kit: Path, address: str | None = None) -> None:
        self._kits = _read_kits(kit)
        self._address = address
        self._channels: dict[str, StageChannel] = {}
        self._stack = ExitStack()

    def close(self) -> None:
        """Let go of every connection."""
        self._stack.close()
        self._channels.clear()

    def channel(self, tenant: str) -> StageChannel:
        """Return the connection by which a tenancy is reached.

        Args:
            tenant: A client's name, alone or with a space and a purpose after it. What belongs to no client with a
                kit of its own goes by the first.
        """
        owner = next((name for name in self._kits if tenant == name or tenant.startswith(name + " ")), None)
        name = owner if owner is not None else next(iter(self._kits))
        if name not in self._channels:
            kit = self._kits[name]
            self._channels[name] = StageChannel(self._address or kit.address, kit)
            self._stack.callback(self._channels[name].close)
        return self._channels[name]

    def connector(self, backbone: Backbone, config: Config) -> Callable[[str, CutPlan], Transport]:
        """Make what connects one tenancy of a run, by name and cut."""
        base = backbone.fingerprint()

        def connect(tenant: str, plan: CutPlan) -> Transport:
            return GrpcTransport(
                self.channel(tenant),
                tenant,
                plan,
                base_sha256=base,
                width=backbone.hidden_size,
                adapter=config.adapter,
                training=config.training,
                dtype=backbone.dtype,
                device=backbone.device,
                wires=_wires(config),
            )

        return connect


def _wires(config: Config) -> tuple[Wire, ...]:
    """Say in which forms states may travel: whatever keeps every bit, or just the one that was asked for."""
    if config.runtime.wire != "exact":
        return (Wire(config.runtime.wire),)
    return (Wire.FLOAT32,) if config.backbone.dtype == "float32" else (Wire.BFLOAT16, Wire.FLOAT32)


def _read_kits(folder: Path) -> dict[str, Kit]:
    """Read one kit, or one from each folder below."""
    if (folder / "kit.json").exists():
        return {"": read_kit(folder)}
    found = {path.parent.name: read_kit(path.parent) for path in sorted(folder.glob("*/kit.json"))}
    if not found:
        raise IdentityError(
            f"{folder} is no startup kit and holds none", cure="Give the folder that `pplr enroll client` wrote."
        )
    return found
