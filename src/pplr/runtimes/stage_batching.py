"""Dynamic batching on the stage server: a call is carried out at its turn, alone or with other clients' as one pass.

Each call of a pass of several is answered, refused and counted by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from pplr.errors import TransportError, UnknownSessionError, WireError
from pplr.runtimes.meetings import Guest, Meetings
from pplr.runtimes.stage_metrics import StageMetrics
from pplr.runtimes.stage_passes import TrainingPasses
from pplr.runtimes.stage_sessions import Session
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.runtimes.turns import Turns
from pplr.stages.host import Asked

__all__ = ["DynamicBatcher"]


class DynamicBatcher:
    """Carries out the calls of sessions, and training passes of several clients as one where that is granted.

    Args:
        passes: Reads, computes and writes training passes.
        tenancies: Of all clients.
        turns: Whose turn it is to compute.
        metrics: Counts how long calls wait, and how many clients are in a pass.

    Attributes:
        meetings: Where calls of different clients meet.
    """

    def __init__(self, passes: TrainingPasses, tenancies: Tenancies, turns: Turns, metrics: StageMetrics) -> None:
        self._passes, self._tenancies, self._turns, self._metrics = passes, tenancies, turns, metrics
        self.meetings = Meetings(tenancies.limits.together, tenancies.limits.max_together_tokens)

    def carry_out(self, handler: Callable[..., Any], session: Session, request: Any, told: tuple[str, bytes]) -> bytes:
        """Carry out a session's call at its turn, and count it with its reply.

        Args:
            handler: Carries it out by itself.
            session: Whose lock the caller holds.
            request: What was asked.
            told: The method's name, and a hash of the content.

        Raises:
            PplrError: It is refused, or a newer session took this one's place.
        """
        name = told[0]
        if self._tenancies.limits.together > 1 and (found := self._meeting(name, session, request)) is not None:
            tokens = request.states.rows * (request.states.prefix + request.states.tokens)
            guest = Guest(session.owner.client, tokens, (session, request, told))
            return self._meet(name, guest, *found)
        return self._carry_out_alone(handler, session, request, told)

    def _carry_out_alone(
        self, handler: Callable[..., Any], session: Session, request: Any, told: tuple[str, bytes]
    ) -> bytes:
        name, started = told[0], time.monotonic()
        with self._turns.of(session.owner.client):
            self._metrics.waited(name, time.monotonic() - started)
            if not self._tenancies.is_current(session):  # a newer session took its place while this one waited
                raise _replaced()
            session.used = time.monotonic()
            with _fitting():
                reply: bytes = handler(session, request).SerializeToString()
            session.used = time.monotonic()
            self._tenancies.count(session, told, reply)
            return reply

    # -- several clients in one pass --------------------------------------------------------------------------

    def _meeting(self, name: str, session: Session, request: Any) -> tuple[Hashable, frozenset[str]] | None:
        """Say with which other calls a call can be computed, by a key, and whose are expected.

        Needs no turn. ``None`` for a call that is computed by itself.
        """
        try:
            if name == "Forward" and request.keep and request.adapter and session.host.takes_several:
                others = [own for own in self._tenancies.all() if own.host is session.host and own.in_round]
                return (name, session.host), frozenset(own.owner.client for own in others)
            if name == "Backward" and (joint := session.host.joint_pass(session.name, request.step)) is not None:
                names = session.host.awaited(joint)
                return (name, joint), frozenset(own.owner.client for own in self._tenancies.all() if own.name in names)
        except TransportError:  # the tenancy is gone, which its own turn will tell
            pass
        return None

    def _meet(self, name: str, guest: Guest, key: Hashable, expected: frozenset[str]) -> bytes:
        """Wait for others to be computed with, and for the turn of any of them: whose comes first computes for all."""
        started = time.monotonic()
        meeting = self.meetings.attend(key, guest, expected)
        with self._turns.of(guest.client, guest.ticket) as is_mine:
            if is_mine and not guest.is_served:
                guests = self.meetings.close(key, meeting, guest)
                began = time.monotonic()
                self._metrics.waited(name, began - started)
                self._metrics.together(len(guests))
                self._carry_out_together(name, guests)
                self.meetings.took(time.monotonic() - began)
                for other in guests:
                    if other is not guest:
                        self._turns.call_off(other.client, other.ticket)
        return guest.result()

    def _carry_out_together(self, name: str, guests: Sequence[Guest]) -> None:
        """Carry out the calls of several sessions; each is answered, refused and counted by itself."""
        current = [own for own in guests if self._tenancies.is_current(own.work[0])]
        for own in guests:
            if own not in current:
                own.refuse(_replaced())
        replies = self._together(name, [own.work[:2] for own in current]) if current else []
        for own, reply in zip(current, replies, strict=True):
            session, _, told = own.work
            session.used = time.monotonic()
            try:
                with _fitting():
                    if isinstance(reply, Exception):
                        raise reply
                    content = bytes(reply.SerializeToString())
                self._tenancies.count(session, told, content)
                own.serve(content)
            except Exception as error:
                own.refuse(error)

    def _together(self, name: str, calls: Sequence[tuple[Session, Any]]) -> list[Any]:
        """Carry out calls of one :meth:`_meeting` as one pass.

        Returns:
            Of each call its reply, or what was raised. Whoever fails, fails alone.
        """
        found: list[Any] = [None] * len(calls)
        ready: list[tuple[int, Asked, Tensor]] = []
        for number, (session, request) in enumerate(calls):
            try:
                ready.append((number, *self._read(name, session, request)))
            except Exception as error:
                found[number] = error
        passed = [asked for _, asked, _ in ready]
        left: Sequence[Tensor | None] | None = None
        if len(ready) > 1:
            host = calls[0][0].host
            with suppress(RuntimeError, TransportError):  # as when memory is short; then each by itself
                left = host.forward_together(passed) if name == "Forward" else host.backward_together(passed)
        alone = self._passes.forward if name == "Forward" else self._passes.backward
        write: Callable[..., Any] = self._passes.forward_out if name == "Forward" else self._passes.backward_out
        for place, (number, _, lengths) in enumerate(ready):
            session, request = calls[number]
            try:
                own = alone(session, request) if left is None else write(session, request, left[place], lengths)
                found[number] = own
            except Exception as error:
                found[number] = error
        return found

    def _read(self, name: str, session: Session, request: Any) -> tuple[Asked, Tensor]:
        """Read what is to be computed with others, and refuse what would not be by itself."""
        if name == "Forward":
            asked, lengths = self._passes.forward_in(session, request)
            session.host.check_step(asked.client, asked.step)
        else:
            asked, lengths = self._passes.backward_in(session, request)
            session.host.check_gradient(asked.client, asked.step, asked.hidden_states)
        return asked, lengths


def _replaced() -> UnknownSessionError:
    return UnknownSessionError("a newer session took the place of this one", cure="Say hello again.")


@contextmanager
def _fitting() -> Iterator[None]:
    """Say in words what torch says of shapes that do not meet."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        raise WireError("the request does not fit what is kept for you", cure="Begin the step anew.") from error
