"""Whose turn it is to compute: one at a time, and clients in rotation, so that none can keep the others out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


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
        self._queues: dict[str, deque[threading.Event]] = {}
        self._turn = 0
        self._last: dict[str, int] = {}  # each client's last turn

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    @contextmanager
    def of(self, client: str) -> Iterator[None]:
        """Wait for a turn of this client, and pass it on at the end."""
        own = threading.Event()
        with self._lock:
            if not self._taken:
                self._taken = True
                self._give(client, own)
            else:
                self._queues.setdefault(client, deque()).append(own)
        own.wait()
        try:
            yield
        finally:
            self._pass_on()

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

    def _give(self, client: str, call: threading.Event) -> None:
        self._turn += 1
        self._last[client] = self._turn
        call.set()
