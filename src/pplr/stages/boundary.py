"""The cut in the autograd graph: a stage elsewhere is still one differentiable operation."""

from __future__ import annotations

import torch
from torch import Tensor

from pplr.stages.stage import StageCall
from pplr.stages.transport import Transport

__all__ = ["Crossing"]


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
    ) -> Tensor:
        """Send hidden states, return the middle stage's."""
        ctx.crossing = (transport, step, lengths)  # type: ignore[attr-defined]
        return transport.forward(hidden_states.detach(), lengths, call, keep_as=step)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradient, return the middle stage's."""
        transport, step, lengths = ctx.crossing  # type: ignore[attr-defined]
        return transport.backward(step, grads[0].contiguous(), lengths), None, None, None, None
