"""How long work tells what it is doing, without knowing who listens: a terminal, a log, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """A listener."""

    def note(self, line: str) -> None:
        """Hear one finished line, such as what was fetched."""

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a task of ``total`` units; the function it yields is told how many were done."""

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Hear the record of a finished server round, as it stands in ``rounds.jsonl``."""


class Silent:
    """Listens to nothing."""

    def note(self, line: str) -> None:
        """Pass over a line."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Pass over a task."""
        yield lambda _: None

    def server_round(self, record: Mapping[str, Any]) -> None:
        """Pass over a round."""
