"""Keys and values of a generation in every stage, and those that are kept from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pplr.stages.transport import KeepingTransport, Transport

__all__ = ["GenerationCache", "Openings"]

_KEPT = 2


@dataclass
class GenerationCache:
    """Keys and values of one generation, in every stage.

    Args:
        input: Of the input stage.
        middle: Number of the open cache behind the transport.
        output: Of the output stage.
    """

    input: Any
    middle: int | None
    output: Any


class Openings:
    """Caches of what prompts begin with, run once for each state of the adapter; the newest few are kept.

    Args:
        run: Runs one row of tokens into new caches.
        version: Numbers the state of every stage's adapter.
        transport: The way to the middle blocks, where they are held as well; ``None`` when the model is not cut.
    """

    def __init__(
        self,
        run: Callable[[tuple[int, ...]], GenerationCache],
        version: Callable[[], tuple[int, ...]],
        transport: Transport | None,
    ) -> None:
        self._run, self._version, self._transport = run, version, transport
        self._kept: dict[tuple[int, ...], GenerationCache] = {}
        self._kept_for: tuple[int, ...] = ()

    def of(self, tokens: tuple[int, ...]) -> GenerationCache:
        """Return open caches of one row that holds these tokens."""
        version = self._version()
        if version != self._kept_for:
            self.close()
        kept = self._kept.get(tokens)
        if kept is None or not self._holds(kept):  # it was let go of after an error
            kept = self._run(tokens)
            while len(self._kept) >= _KEPT:
                self._close(next(iter(self._kept)))
            self._kept[tokens], self._kept_for = kept, version
        return kept

    def __len__(self) -> int:
        """Count what is kept."""
        return len(self._kept)

    def close(self) -> None:
        """Let go of all."""
        for tokens in list(self._kept):
            self._close(tokens)

    def _holds(self, kept: GenerationCache) -> bool:
        keeping = self._transport if isinstance(self._transport, KeepingTransport) else None
        return keeping is None or kept.middle is None or keeping.holds_cache(kept.middle)

    def _close(self, tokens: tuple[int, ...]) -> None:
        kept = self._kept.pop(tokens)
        if self._transport is not None and kept.middle is not None and self._holds(kept):
            self._transport.close_cache(kept.middle)
