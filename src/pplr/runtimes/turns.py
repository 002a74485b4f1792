"""Whose turn it is to compute: one at a time, and clients in rotation, so that none can keep the others out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Ticket", "Turns"]


class Ticket:
    """A place in the line, by which a call that another has served can be sent home."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.called_off = False


class Turns:
    """A lock that goes round: of the clients that wait, the one whose last turn is longest ago is next.

    However many calls a client sends, each other client waits for at most one of them.

    Example:
        >>> turns = Turns()
        >>> with turns.of("a"):
        ...     turns.waiting
        0
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._queues: dict[str, deque[Ticket]] = {}
        self._turn = 0
        self._last: dict[str, int] = {}  # each client's last turn

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    @contextmanager
    def of(self, client: str, ticket: Ticket | None = None) -> Iterator[bool]:
        """Wait for a turn of this client, and pass it on at the end.

        Args:
            client: Whose turn.
            ticket: By which the call can be called off while it waits.

        Yields:
            Whether it is this call's turn; if not, it was called off.
        """
        own = ticket or Ticket()
        with self._lock:
            if own.called_off:
                own.ready.set()
            elif not self._taken:
                self._taken = True
                self._give(client, own)
            else:
                self._queues.setdefault(client, deque()).append(own)
        own.ready.wait()
        if own.called_off:
            yield False
            return
        try:
            yield True
        finally:
            self._pass_on()

    def call_off(self, client: str, ticket: Ticket) -> None:
        """Send a call home that waits, or will wait, for a turn of this client: it needs none any more."""
        with self._lock:
            ticket.called_off = True
            queue = self._queues.get(client)
            if queue is not None and ticket in queue:
                queue.remove(ticket)
                if not queue:
                    del self._queues[client]
            ticket.ready.set()

    def _pass_on(self) -> None:
        with self._lock:
            if not self._queues:
                self._taken = False
                return
            client = min(self._queues, key=lambda waiting: self._last.get(waiting, 0))  # among equals, who came first
            queue = self._queues[client]
            self._give(client, queue.popleft())
            if not queue:
                del self._queues[client]

    def _give(self, client: str, call: Ticket) -> None:
        self._turn += 1
        self._last[client] = self._turn
        call.ready.set()
