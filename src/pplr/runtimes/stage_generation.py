"""Generation as a stage server is asked for it: caches that are opened, extended, joined and closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pplr.errors import LimitError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.stage_passes import TrainingPasses, check_tokens, refuse
from pplr.runtimes.stage_sessions import CacheState, Session
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.stages.stage import StageCall

__all__ = ["Generations"]


class Generations:
    """Key-value caches of one client at a time. What is refused leaves a cache as it was.

    Args:
        tenancies: Of all clients.
        passes: Reads states.
    """

    def __init__(self, tenancies: Tenancies, passes: TrainingPasses) -> None:
        self._tenancies, self._passes = tenancies, passes
        self._limits, self._backbone = tenancies.limits, tenancies.backbone

    def open_cache(self, session: Session, request: Any) -> Any:
        """Open a cache that holds nothing."""
        if len(session.caches) >= self._limits.max_caches:
            raise LimitError("too many open caches", cure="Close those that are done.")
        cache = session.host.open_cache(session.name)
        session.caches[cache] = CacheState()
        return pb.CacheReply(cache=cache)

    def close_cache(self, session: Session, request: Any) -> Any:
        """Let go of a cache."""
        session.close_cache(request.cache)
        return pb.Done()

    def decode(self, session: Session, request: Any) -> Any:
        """Run new tokens after those of a cache, of which some rows may be let go of first."""
        if request.states.HasField("prefix"):
            refuse("new tokens of a cache in one row", "Send them padded on the left.")
        states, new = self._passes.states_in(session, request.states)
        cache = _cache(session, request.cache)
        held = self._rows_of(cache, request.rows) if request.rows else cache.lengths or (0,) * states.shape[0]
        tokens, sees = states.shape[1], len(request.sees) > 0
        total = tuple(h + n for h, n in zip(held, new.tolist(), strict=False))
        gaps = any(h > 0 and n < tokens for h, n in zip(held, new.tolist(), strict=False))
        padded = request.states.padded_left or all(n == tokens for n in new.tolist())
        meets = len(request.total_lengths) == len(held) and total == tuple(request.total_lengths)
        if sees:  # the mask says it all
            gaps, meets = False, not request.total_lengths
        if len(held) != states.shape[0] or gaps or not padded or not meets or (cache.told and not sees) or (
            request.total_tokens != cache.tokens + tokens
        ):  # fmt: skip
            refuse("rows or lengths that do not meet the cache", "Say what the cache holds, padded on the left.")
        self._check_room(session, cache, len(held), request.total_tokens)
        call = self._decode_call(request, total, tokens)
        try:
            self._keep(session, request.cache, request.rows)
            left = session.host.decode(session.name, states, call, request.cache)
            reply = pb.StatesReply(
                states=codec.encode_states(left, new, session.wire, padded_left=request.states.padded_left)
            )
        except Exception:
            session.close_cache(request.cache)  # it may be half extended
            raise
        session.caches[request.cache] = CacheState(request.total_tokens, total, sees or cache.told)
        return reply

    def append_rows(self, session: Session, request: Any) -> Any:
        """Append copies of rows of another cache, which then go on together with those of this one."""
        cache, other = _cache(session, request.cache), _cache(session, request.other)
        if cache is other or not other.tokens or not request.rows:
            refuse(
                "rows of the cache itself, of an empty one, or none", "Append rows of another cache that holds some."
            )
        added = self._rows_of(other, request.rows)
        held = self._rows_of(cache, request.keep) if request.keep else cache.lengths
        spare = max(0, cache.tokens - 1) if cache.told else cache.tokens - max(held, default=cache.tokens)
        if request.skip > spare:
            refuse(
                f"to let go of the first {request.skip} tokens of a cache of {cache.tokens}, {spare} of which can go",
                "Let go of padding alone, or of what no mask shows any more.",
            )
        left = cache.tokens - request.skip
        tokens = max(left, other.tokens)
        self._check_room(session, cache, len(held) + len(added), tokens)
        try:
            self._keep(session, request.cache, request.keep)
            rows = torch.tensor(list(request.rows), dtype=torch.long, device=self._backbone.device)
            session.host.append_rows(session.name, request.cache, request.other, rows, request.skip)
        except Exception:
            session.close_cache(request.cache)  # it may be half extended
            raise
        lengths = (*(min(length, left) for length in held), *added)
        session.caches[request.cache] = CacheState(tokens, lengths, cache.told or other.told)
        return pb.Done()

    def _rows_of(self, cache: CacheState, rows: Sequence[int]) -> tuple[int, ...]:
        """Pick the lengths of rows of a cache."""
        if len(rows) > self._limits.max_rows:
            raise LimitError(f"{len(rows)} rows of a cache", cure="Use fewer beams or smaller batches.")
        if max(rows) >= len(cache.lengths):
            refuse(f"row {max(rows)} of a cache of {len(cache.lengths)} rows", "Keep rows that are there.")
        return tuple(cache.lengths[row] for row in rows)

    def _keep(self, session: Session, number: int, rows: Sequence[int]) -> None:
        if rows:
            kept = torch.tensor(list(rows), dtype=torch.long, device=self._backbone.device)
            session.host.reorder_cache(session.name, number, kept)

    def _check_room(self, session: Session, cache: CacheState, rows: int, tokens: int) -> None:
        """Refuse what a cache is to become if it is more than is granted."""
        if rows > self._limits.max_rows:
            raise LimitError(f"{rows} rows of a cache", cure="Use fewer beams or smaller batches.")
        if tokens > self._limits.max_tokens:
            raise LimitError(
                f"sequences of {tokens} tokens, at most {self._limits.max_tokens} are granted",
                cure="Shorten prompts or answers.",
            )
        held = sum(
            own.tokens * len(own.lengths)
            for other in self._tenancies.of(session.owner.client)
            for own in other.caches.values()
            if own is not cache
        )
        check_tokens(held + tokens * rows, self._limits.max_cache_tokens, "are in caches")

    def _decode_call(self, request: Any, total: tuple[int, ...], tokens: int) -> StageCall:
        """Make the mask and the positions of new tokens from what a request says of them."""
        device = self._backbone.device
        if request.sees:
            sees = codec.decode_sees(request.sees, len(total), tokens, request.total_tokens).to(device)
            return StageCall(attention_mask=sees[:, None], position_ids=sees.sum(dim=2) - 1)
        most_rows, most = self._limits.max_rows, self._limits.max_tokens
        mask = codec.left_mask(request.total_tokens, total, max_rows=most_rows, max_tokens=most).to(device)
        return StageCall(attention_mask=mask, position_ids=codec.positions_of(mask, tokens))


def _cache(session: Session, number: int) -> CacheState:
    cache = session.caches.get(number)
    if cache is None:
        refuse(f"no open cache {number}", "Open one, and do not use it after closing.")
    return cache
