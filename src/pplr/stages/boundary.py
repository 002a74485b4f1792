"""The cut in the autograd graph: a stage elsewhere is still one differentiable operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from pplr.stages.stage import StageCall
from pplr.stages.transport import Transport

__all__ = ["Crossing", "Guard"]


class Guard(Protocol):
    """What a client does to what it is about to send across the cut."""

    @property
    def settle_rounds(self) -> int | None:
        """After how many server rounds the input stage stays as it is; never when ``None``."""

    def enter(self, occasion: str) -> None:
        """Say what the next passes are for; the same occasion again starts where it started before."""

    def repeating(self, owner: int) -> AbstractContextManager[None]:
        """Draw the same noise for a user's vector behind the same ones, whatever it is sent for and however often.

        Args:
            owner: The user.
        """

    def states(self, hidden_states: Tensor, lengths: Tensor | None = None, *, public: bool = False) -> Tensor:
        """Guard states before the first cut, differentiably: (B, T, D) -> (B, T, D).

        Args:
            hidden_states: (B, T, D).
            lengths: (B,) real states of each row; all when absent. Padding never crosses and stays as it is.
            public: Whether the pass holds nothing of a user.
        """

    def normal(self, mean: Tensor, lengths: Tensor | None = None, *, public: bool = False) -> Tensor:
        """Draw standard normal noise for codes where noise is learned, else none: (B, T, r) -> (B, T, r).

        Args:
            mean: (B, T, r), what the noise is to hide.
            lengths: (B,) real states of each row; all when absent. Padding has none.
            public: Whether the pass holds nothing of a user; then there is none.
        """

    def gradient(self, gradient: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """Guard a gradient before the second cut: (B, T, D) -> (B, T, D).

        Args:
            gradient: (B, T, D), of the batch's summed loss times ``scale``.
            lengths: (B,) real states of each row.
            scale: By how much the summed loss was scaled.
        """


class Crossing(torch.autograd.Function):
    """The cut as one differentiable operation: forward and backward are each one exchange over a transport."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_states: Tensor,
        lengths: Tensor,
        transport: Transport,
        call: StageCall,
        step: int,
        outgoing: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> Tensor:
        """Send hidden states, return the middle stage's; ``outgoing`` is what becomes of the gradient that is sent."""
        ctx.crossing = (transport, step, lengths, outgoing)  # type: ignore[attr-defined]
        return transport.forward(hidden_states.detach(), lengths, call, keep_as=step)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradient, return the middle stage's, if it was wanted."""
        transport, step, lengths, outgoing = ctx.crossing  # type: ignore[attr-defined]
        return transport.backward(step, outgoing(grads[0].contiguous()), lengths), None, None, None, None, None
