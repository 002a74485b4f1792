"""Training passes of several clients that are computed as one: who meets whom, and for how long one waits for others.

A call waits at most as long as the newest pass took, and only for clients that came the last time. It keeps its own
place in the line all the while, so nobody is served later for meeting others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from pplr.runtimes.turns import Ticket

__all__ = ["Guest", "Meeting", "Meetings"]

_LONGEST_S = 5.0


@dataclass(eq=False)
class Guest:
    """One call that can be computed together with others.

    Args:
        client: Whose it is.
        tokens: Of its batch, with padding.
        work: What is to be done.
    """

    client: str
    tokens: int
    work: Any
    ticket: Ticket = field(default_factory=Ticket)
    _reply: bytes | None = None
    _error: Exception | None = None

    @property
    def is_served(self) -> bool:
        """Whether there is a reply or a refusal."""
        return self._reply is not None or self._error is not None

    def serve(self, reply: bytes) -> None:
        """Give it its reply."""
        self._reply, self._error = reply, None

    def refuse(self, error: Exception) -> None:
        """Give it a refusal; a reply that comes after it counts."""
        self._error = error

    def result(self) -> bytes:
        """Return the reply, or raise the refusal."""
        if self._reply is not None:
            return self._reply
        raise self._error or RuntimeError("a call that was neither served nor refused")


@dataclass(eq=False)
class Meeting:
    """Calls that will be computed as one."""

    opened: float
    guests: list[Guest] = field(default_factory=list)
    full: threading.Event = field(default_factory=threading.Event)


class Meetings:
    """Where calls of different clients meet.

    Args:
        most: Clients in a pass.
        most_tokens: Tokens in a pass of several.
    """

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most, self._most_tokens = most, most_tokens
        self._lock = threading.Lock()
        self._open: dict[Hashable, Meeting] = {}
        self._absent: set[str] = set()  # clients that others have waited for in vain
        self.patience_s = 0.0

    def attend(self, key: Hashable, guest: Guest, expected: frozenset[str]) -> Meeting:
        """Join the calls of the same key, and wait a while for more.

        Args:
            key: Calls of one key can be computed as one.
            guest: The call.
            expected: Clients that are likely to come.
        """
        with self._lock:
            self._absent.discard(guest.client)
            meeting = self._open.get(key)
            if meeting is None or not self._has_room(meeting, guest):
                if meeting is not None:
                    meeting.full.set()
                meeting = self._open[key] = Meeting(time.monotonic())
            meeting.guests.append(guest)
            if len(meeting.guests) >= self._most or not self._missing(meeting, expected):
                meeting.full.set()
        left = meeting.opened + self.patience_s - time.monotonic()
        if not meeting.full.wait(max(0.0, left)):
            with self._lock:
                if self._open.get(key) is meeting:
                    self._absent |= self._missing(meeting, expected)
        return meeting

    def _missing(self, meeting: Meeting, expected: frozenset[str]) -> set[str]:
        return set(expected) - self._absent - {own.client for own in meeting.guests}

    def _has_room(self, meeting: Meeting, guest: Guest) -> bool:
        tokens = guest.tokens + sum(own.tokens for own in meeting.guests)
        others = {own.client for own in meeting.guests}
        return len(others) < self._most and guest.client not in others and tokens <= self._most_tokens

    def close(self, key: Hashable, meeting: Meeting, guest: Guest) -> list[Guest]:
        """Take whoever is there, at a call's turn; nobody joins them any more.

        Args:
            key: Of the meeting.
            meeting: Where the call waited.
            guest: The call; one whose meeting was closed before and which was left over is alone.
        """
        with self._lock:
            if self._open.get(key) is meeting:
                del self._open[key]
            found, meeting.guests = meeting.guests, []
            return found if guest in found else [guest]

    def took(self, seconds: float) -> None:
        """Learn how long a pass takes."""
        self.patience_s = min(_LONGEST_S, seconds)
