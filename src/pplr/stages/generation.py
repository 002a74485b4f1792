"""A generation token by token: keys and values in every stage, and those that are kept for the next generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pplr.backbones.caches import append_rows
from pplr.stages.stage import Member, Stage, StageCall
from pplr.stages.transport import KeepingTransport, Transport

__all__ = ["Generation", "Openings"]

_KEPT = 2


class Generation:
    """Open caches in every stage, and what runs after them: :meth:`~pplr.stages.client_model.ClientModel.generation`.

    Args:
        stages: The input stage and the output stage.
        members: The client's adapter in each of them.
        transport: The way to the middle blocks; ``None`` when the model is not cut.
        guarded: Makes of states (B, T, D) what crosses to them.
    """

    def __init__(
        self,
        stages: tuple[Stage, Stage],
        members: tuple[Member, Member],
        transport: Transport | None,
        guarded: Callable[[Tensor], Tensor],
    ) -> None:
        self._stages, self._members, self._transport, self._guarded = stages, members, transport, guarded
        self._backbone = stages[0].backbone
        self._caches = tuple(self._backbone.new_cache(stage.blocks) for stage in stages)
        self._middle = None if transport is None else transport.open_cache()

    @torch.no_grad()
    def decode(self, input_ids: Tensor, call: StageCall) -> Tensor:
        """Run new tokens after what the caches hold: (B, T) -> (B, T, D), before the final norm."""
        states = self._backbone.embed(input_ids, self._members[0].ends)
        states = self._stages[0].run(self._members[0], states, call, self._caches[0])
        if self._transport is not None and self._middle is not None:
            states = self._transport.decode(self._guarded(states), call, self._middle)
        return self._stages[1].run(self._members[1], states, call, self._caches[1])

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows of every cache, in the given order."""
        for stage, own in zip(self._stages, self._caches, strict=True):
            if len(stage.span) > 0:
                own.reorder_cache(rows)
        if self._transport is not None and self._middle is not None:
            self._transport.reorder_cache(self._middle, rows)

    def append_rows(self, other: Generation, rows: Tensor, skip: int = 0) -> None:
        """Append rows of another generation in every stage; see :func:`~pplr.backbones.caches.append_rows`."""
        for own, more in zip(self._caches, other._caches, strict=True):
            append_rows(own, more, rows, skip)
        if self._transport is not None and self._middle is not None and other._middle is not None:
            self._transport.append_rows(self._middle, other._middle, rows, skip)

    @property
    def is_held(self) -> bool:
        """Whether what is held behind a transport is held there still; it lets go of it after an error."""
        keeping = self._transport if isinstance(self._transport, KeepingTransport) else None
        return keeping is None or self._middle is None or keeping.holds_cache(self._middle)

    def close(self) -> None:
        """Let go of what is held behind the transport."""
        if self._transport is not None and self._middle is not None and self.is_held:
            self._transport.close_cache(self._middle)


class Openings:
    """Caches of what prompts begin with, run once for each state of the adapter; the newest few are kept.

    Args:
        run: Runs one row of tokens into a new generation.
        version: Numbers the state of every stage's adapter.
    """

    def __init__(self, run: Callable[[Sequence[int]], Generation], version: Callable[[], tuple[int, ...]]) -> None:
        self._run, self._version = run, version
        self._kept: dict[tuple[int, ...], Generation] = {}
        self._kept_for: tuple[int, ...] = ()

    def of(self, tokens: tuple[int, ...]) -> Generation:
        """Return a generation of one row that holds these tokens."""
        version = self._version()
        if version != self._kept_for:
            self.close()
        kept = self._kept.get(tokens)
        if kept is None or not kept.is_held:
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

    def _close(self, tokens: tuple[int, ...]) -> None:
        self._kept.pop(tokens).close()
