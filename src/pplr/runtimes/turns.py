"""Whose turn it is to compute: one at a time, and clients in rotation, so that none can keep the others out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


class Turns:
    """A lock that goes round: of the clients that wait, the one who waited longest since its last turn is next.

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
        self._queues: dict[str, deque[threading.Event]] = {}  # in the order in which clients are served next

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
                own.set()
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
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            queue.popleft().set()
            if queue:
                self._queues[client] = queue  # at the end: the others come first
