"""Every exchange of one request across the cut, recorded on the client's side of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pplr.stages.stage import StageCall
from pplr.stages.transport import Transport

__all__ = ["Exchange", "Message", "Recorder"]


@dataclass(frozen=True)
class Message:
    """Hidden states that went one way.

    Args:
        shape: (B, T, D), padding included, which does not cross.
        dtype: Such as ``bfloat16``, as the client holds them.
        vectors: States that crossed, one for each real token.
        sent_bytes: What they took.
    """

    shape: tuple[int, ...]
    dtype: str
    vectors: int
    sent_bytes: int


@dataclass(frozen=True)
class Exchange:
    """One call to the server, and its answer.

    Args:
        call: ``forward`` for whole sequences, ``decode`` for tokens that follow what the server keeps.
        up: From the client.
        down: From the server.
        milliseconds: From the call to the answer: the server's computing, and the way where there is one.
    """

    call: Literal["forward", "decode"]
    up: Message
    down: Message
    milliseconds: float


class Recorder:
    """A transport that writes down what crosses in inference, and passes it on untouched.

    Args:
        transport: The real way to the middle stage.
        tokens: Of the sequence that is kept, where it may cross in several calls, its beginning first; without it what
            the first call brings is kept.

    Attributes:
        exchanges: What crossed, in order.
        first: (T, D) float32, the real states of the first row that crossed first, as an attacker would keep them.
    """

    def __init__(self, transport: Transport, tokens: int | None = None) -> None:
        self._transport, self._tokens = transport, tokens
        self.exchanges: list[Exchange] = []
        self.first: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage: (B, T, D) -> (B, T, D)."""
        self._keep(hidden_states[0, : int(lengths[0])])
        before, began = self._transport.traffic.reading(), time.perf_counter()
        back = self._transport.forward(hidden_states, lengths, call, keep_as=keep_as)
        self._note("forward", hidden_states, back, lengths, before, began)
        return back

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage and extend a cache: (B, T, D) -> (B, T, D)."""
        lengths = call.new_lengths(hidden_states.shape[1])
        self._keep(hidden_states[0, hidden_states.shape[1] - int(lengths[0]) :])
        before, began = self._transport.traffic.reading(), time.perf_counter()
        back = self._transport.decode(hidden_states, call, cache)
        self._note("decode", hidden_states, back, lengths, before, began)
        return back

    def _keep(self, states: Tensor) -> None:
        """Add (T, D) states to those of the sequence, until it is whole."""
        states = states.detach().float().cpu()
        if self.first is None:
            self.first = states[: self._tokens]
        elif self._tokens is not None and len(self.first) < self._tokens:
            self.first = torch.cat([self.first, states])[: self._tokens]

    def _note(
        self, call: Literal["forward", "decode"], up: Tensor, down: Tensor, lengths: Tensor, before: Any, began: float
    ) -> None:
        if down.device.type == "cuda":
            torch.cuda.synchronize(down.device)
        took = (time.perf_counter() - began) * 1_000
        crossed, vectors = self._transport.traffic.since(before), int(lengths.sum())
        sent, returned = (
            Message(tuple(own.shape), str(own.dtype).removeprefix("torch."), vectors, count)
            for own, count in ((up, crossed.bytes_up), (down, crossed.bytes_down))
        )
        self.exchanges.append(Exchange(call, sent, returned, took))
