"""Models of clients that recommend, kept from one request to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pplr.backbones.adapters import adapter_sha256
from pplr.runtimes.recommending import reading

if TYPE_CHECKING:
    from pplr.backbones.adapters import AdapterState
    from pplr.runtimes.assembly import Assembly
    from pplr.stages.client_model import ClientModel

__all__ = ["Readers"]

_REQUESTS = "requests"
_MOST = 8
"""Clients whose models are kept."""


class Readers:
    """Models that recommend, kept from one request to the next with what they made of the words before a history.

    A model is kept while its client's adapter stays as it is, those of the newest few clients. Nothing is kept where a
    stage server hosts the middle blocks, nor where states are guarded, since each request has noise of its own.

    Args:
        parts: Of the run.
    """

    def __init__(self, parts: Assembly) -> None:
        self._parts = parts
        self._kept: dict[str, tuple[str, ClientModel]] = {}

    @contextmanager
    def reading(self, client: str, adapter: AdapterState) -> Iterator[ClientModel]:
        """Admit a client to be recommended to, unless it is still there."""
        if self._parts.is_remote or self._parts.config.privacy.states.is_on:
            with reading(self._parts, client, adapter) as reader:
                yield reader
            return
        kept, sha256 = self._kept.pop(client, None), adapter_sha256(adapter)
        if kept is not None and kept[0] != sha256:
            self._parts.dismiss(client, _REQUESTS)
            kept = None
        if kept is None:
            kept = (sha256, self._parts.admit(client, adapter, _REQUESTS))
        try:
            yield kept[1]
        except BaseException:  # what it holds is not known
            self._parts.dismiss(client, _REQUESTS)
            raise
        self._kept[client] = kept  # the newest last
        while len(self._kept) > _MOST:
            oldest = next(iter(self._kept))
            self._kept.pop(oldest)
            self._parts.dismiss(oldest, _REQUESTS)

    def forget(self) -> None:
        """Forget the models, which were dismissed elsewhere."""
        self._kept.clear()
