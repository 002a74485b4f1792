"""Who has what on the stage server: tenancies around one frozen base, their sessions, and what becomes of idle ones.

A tenancy is one adapter with its optimizer, of one client, under a name that the client chose. A session is one
process's use of a tenancy; a newer session takes the place of an older one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pplr.backbones.adapters import adapter_shapes, check_adapter
from pplr.backbones.base import Backbone
from pplr.errors import LimitError, PplrError, TransportError, UnknownSessionError
from pplr.runtimes.codec import Wire
from pplr.runtimes.stage_sessions import Offer, ServerLimits, Session, Settings, check_state
from pplr.runtimes.stage_state import Owner, StateStore
from pplr.stages.host import StageHost

__all__ = ["Tenancies"]

_ADAM = 4  # a float32 number has a gradient and two moments beside it


class Tenancies:
    """Every tenancy of one stage server. Its caller computes one call at a time, except where it says otherwise.

    Args:
        backbone: The base, whole or a server's bundle.
        base_sha256: Its fingerprint.
        limits: What is granted.
        store: Where tenancies are saved; ``None`` keeps them in memory alone.
        recompute: Whether blocks with LoRA run again in the backward pass rather than keep their activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        base_sha256: str,
        limits: ServerLimits,
        store: StateStore | None,
        *,
        recompute: bool = False,
    ) -> None:
        self.backbone, self.base, self.limits, self.store = backbone, base_sha256, limits, store
        self._recompute = recompute
        self._hosts: dict[Settings, StageHost] = {}
        self._sessions: dict[Owner, Session] = {}
        self._offers: dict[Owner, Offer] = {}

    def all(self) -> list[Session]:
        """List every tenancy by its newest session; needs no turn."""
        return list(self._sessions.values())

    @property
    def hosts(self) -> int:
        """Stages in memory, one for each cut and settings."""
        return len(self._hosts)

    def of(self, client: str) -> list[Session]:
        """List one client's."""
        return [session for session in self.all() if session.owner.client == client]

    def session(self, client: str, number: int) -> Session:
        """Find a client's session by its number; needs no turn.

        Raises:
            UnknownSessionError: It is not, or no longer, a session of this client.
        """
        for session in self.of(client):
            if session.number == number:
                return session
        raise UnknownSessionError(
            "this is not a session of yours: the server was started anew, or a newer session took its place",
            cure="Say hello again.",
        )

    def count(self, session: Session, asked: tuple[str, bytes], reply: bytes) -> None:
        """Count a request that was carried out, and keep its reply; too many bytes push out those of other sessions."""
        session.sequence, session.asked, session.reply = session.sequence + 1, asked, reply
        left = self.limits.max_message_bytes - len(reply)
        for other in sorted(self.of(session.owner.client), key=lambda own: own.used, reverse=True):
            if other is not session and other.reply is not None:
                left -= len(other.reply)
                if left < 0:
                    other.reply = None

    def is_current(self, session: Session) -> bool:
        """Tell whether no newer session took its place."""
        return self._sessions.get(session.owner) is session

    def open(self, owner: Owner, settings: Settings, wires: Sequence[Wire], attempt: int, *, keep: bool) -> Session:
        """Open a session.

        Args:
            owner: Whose tenancy.
            settings: The cut, the adapter's and the optimizer's settings.
            wires: Forms that the client accepts; the first is taken.
            attempt: A number of the client's; the same again returns the same session.
            keep: Go on with the tenancy in memory or on disk if its settings are these, instead of beginning anew.

        Raises:
            LimitError: The client has as many tenancies, or as large ones, as it may.
            PplrError: The cut or the adapter does not fit the base, what is to go on cannot be used, or the session of
                this attempt was used already. The tenancy is as it was.
        """
        before = self._sessions.get(owner)
        if before is not None and attempt and before.attempt == attempt:
            if before.sequence:
                raise TransportError(
                    f"attempt {attempt} to open a session, which was opened and used already",
                    cure="Say hello with a number that was not used before.",
                )
            return before
        self._check_room(owner, settings)
        tensors: Mapping[str, Tensor] | None = None
        if keep and before is not None and before.settings == settings:
            tensors = {name: tensor.clone() for name, tensor in before.state().items()}
        elif keep and self.store is not None and (saved := self.store.load(owner)) is not None:
            tensors = saved.tensors if dict(saved.settings) == settings.told(self.base) else None
        host = self._hosts.get(settings) or self._new_host(settings)
        shapes = host.stage.shapes
        if tensors is not None:
            check_state(tensors, shapes, str(owner))
        if before is not None:
            self.dismiss(owner)
        self._hosts[settings] = host
        host.admit(str(owner), {name: torch.zeros(shape) for name, shape in shapes.items()})
        session = Session(owner, host, settings, wires[0], attempt, kept_before=tensors is not None)
        self._sessions[owner] = session
        if tensors is not None:
            session.put_back(tensors)
        return session

    def _new_host(self, settings: Settings) -> StageHost:
        again = self._recompute and settings.adapter.kind == "lora"  # whatever the client does in its own memory
        return StageHost(self.backbone, settings.plan, settings.adapter, settings.training, recompute=again)

    def _check_room(self, owner: Owner, settings: Settings) -> None:
        others = [session for session in self.of(owner.client) if session.owner != owner]
        clients = {session.owner.client for session in self.all()} | {owner.client}
        if len(clients) > self.limits.max_clients:
            raise LimitError("the server has as many clients as it may", cure="Ask its operator for room.")
        if len(others) >= self.limits.max_tenancies:
            raise LimitError(
                f"{len(others)} tenancies, and no more are granted to a client", cure="Leave those that are done."
            )
        width = self.backbone.hidden_size
        if settings.adapter.rank > width:
            raise LimitError(
                f"an adapter of rank {settings.adapter.rank}, at most {width} is granted", cure="Lower adapter.rank."
            )
        shapes = adapter_shapes(self.backbone, settings.plan.middle, settings.adapter)
        held = _bytes(shapes) + sum(_bytes(session.host.stage.shapes) for session in others)
        if held > self.limits.max_tenancy_bytes:
            raise LimitError(
                f"adapters and optimizers of {held} bytes, at most {self.limits.max_tenancy_bytes} are granted",
                cure="Lower adapter.rank, or leave tenancies that are done.",
            )

    def dismiss(self, owner: Owner) -> None:
        """Let go of a tenancy in memory; what was saved of it stays."""
        session = self._sessions.pop(owner, None)
        if session is None:
            return
        session.host.dismiss(session.name)
        if not any(other.settings == session.settings for other in self._sessions.values()):
            self._hosts.pop(session.settings, None)

    def save(self, session: Session) -> None:
        """Write a tenancy to the disk.

        Raises:
            TransportError: This server has no state folder.
            LimitError: The client has as many on the disk as it may.
        """
        store = self._need_store()
        others = sum(own.client == session.owner.client and own != session.owner for own in store.owners())
        if others >= self.limits.max_saved:
            raise LimitError(
                f"{others} tenancies of {session.owner.client} are saved, and no more are granted to a client",
                cure="Have the server's operator delete those that are done from its state folder.",
            )
        store.save(session.owner, session.settings.told(self.base), session.state())

    def restore(self, session: Session) -> None:
        """Put a tenancy back to where it was saved last.

        Raises:
            TransportError: There is nothing saved of it, or it was saved with another cut or other settings.
        """
        saved = self._need_store().load(session.owner)
        if saved is None:
            raise TransportError(f"nothing is saved of {session.owner}", cure="Save it first.")
        if dict(saved.settings) != session.settings.told(self.base):
            raise TransportError(
                f"{session.owner} was saved with another base, cut or settings", cure="Use those it was saved with."
            )
        session.put_back(saved.tensors)

    def offer(self, owner: Owner, label: str, tensors: Mapping[str, Tensor], now: float) -> None:
        """Offer an adapter to a tenancy, which need not be in memory; what was offered to it before is over.

        A tenancy that is being trained stays as it is, so what is mixed never meets half a round.
        """
        self._offers[owner] = Offer(label, tensors, now)

    def take(self, session: Session, label: str) -> None:
        """Put what is offered under a label into its owner's tenancy; the offer stays, for the case of a retry.

        Raises:
            TransportError: Nothing is offered to this tenancy under this label.
            AdapterError: It does not fit this tenancy's cut, or is not finite.
        """
        offer = self._offers.get(session.owner)
        if offer is None or offer.label != label:
            raise TransportError(
                f"no adapter is offered to {session.owner} under {label[:64]!r}",
                cure="This order is over, or the server was started anew: wait for the next one.",
            )
        check_adapter(offer.tensors, session.host.stage.shapes, whose=f"what is offered to {session.owner}")
        session.host.set_adapter(session.name, offer.tensors)

    def _need_store(self) -> StateStore:
        if self.store is None:
            raise TransportError("this server keeps no state on disk", cure="Start it with --state DIR.")
        return self.store

    def tidy(self, now: float) -> list[str]:
        """Let go of what nobody used for long.

        Returns:
            What could not be saved and so was kept, a line each.
        """
        troubles = []
        self._offers = {owner: own for owner, own in self._offers.items() if now - own.at <= self.limits.idle_ttl_s}
        for session in self.all():
            idle = now - session.used
            if idle > self.limits.cache_ttl_s and (session.kept or session.caches):
                session.let_go()
            if idle > self.limits.idle_ttl_s:
                try:
                    if self.store is not None:
                        self.save(session)
                    self.dismiss(session.owner)
                except PplrError as error:
                    troubles.append(f"{session.owner}: {error}")
        return troubles


def _bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the bytes of an adapter in float32, with its gradient and both moments."""
    return _ADAM * 4 * sum(map(math.prod, shapes.values()))
