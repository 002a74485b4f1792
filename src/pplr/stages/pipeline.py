"""Micro-batches in flight: while the server computes on one, the client computes on another.

Each stage takes the micro-batches in their order, forward and backward, so its gradients add up as they do one after
another: the result has the same bits. One thread carries all calls to the server, one at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pplr.backbones.base import Batch
from pplr.stages.stage import StageCall
from pplr.stages.transport import Transport

__all__ = ["Ends", "MicroBatch", "train_overlapped"]

AnswerT = TypeVar("AnswerT")


@dataclass
class MicroBatch:
    """One micro-batch on its way.

    Args:
        batch: Its samples.
        call: How every stage is to be run.
        step: Its number across the cut.
    """

    batch: Batch
    call: StageCall
    step: int


@dataclass(frozen=True)
class Ends:
    """What the client computes.

    Args:
        enter: Runs the input stage: (B, T) -> (B, T, D).
        leave: Runs the output stage on what came back, and sums the loss.
        outgoing: What becomes of the gradient that is sent: (B, T, D) -> (B, T, D).
    """

    enter: Callable[[MicroBatch], Tensor]
    leave: Callable[[Tensor, MicroBatch], Tensor]
    outgoing: Callable[[Tensor, MicroBatch], Tensor]


@dataclass
class _Under(Generic[AnswerT]):
    """A micro-batch that is under way."""

    own: MicroBatch
    entered: Tensor
    answer: Future[AnswerT]


def train_overlapped(
    ends: Ends, transport: Transport, parts: Sequence[MicroBatch], scale: Callable[[Tensor], Tensor], in_flight: int
) -> list[float]:
    """Run micro-batches forward and backward, as many at a time as may be in flight.

    The server gets the passes in the order F1 F2 ... B1 F(n+1) B2 ..., with n in flight.

    Args:
        ends: The client's own stages.
        transport: The way to the server.
        parts: Micro-batches of one batch, in their order.
        scale: Turns a sum of losses into what is minimised.
        in_flight: Most micro-batches whose activations either side keeps.

    Returns:
        Each micro-batch's sum of losses.
    """
    losses: list[float] = []
    forward: deque[_Under[Tensor]] = deque()
    backward: deque[_Under[Tensor | None]] = deque()
    carrier = ThreadPoolExecutor(1, thread_name_prefix="cut")

    def enter(own: MicroBatch) -> None:
        entered = ends.enter(own)
        call = replace(own.call, gradient_wanted=entered.requires_grad)
        sent = carrier.submit(transport.forward, entered.detach(), own.batch.lengths, call, keep_as=own.step)
        forward.append(_Under(own, entered, sent))

    def turn() -> None:
        under = forward.popleft()
        back = under.answer.result().detach().requires_grad_(True)
        loss = ends.leave(back, under.own)
        scale(loss).backward()
        losses.append(float(loss.detach()))
        gradient = torch.zeros_like(back) if back.grad is None else back.grad.contiguous()
        gradient = ends.outgoing(gradient, under.own)
        answer = carrier.submit(transport.backward, under.own.step, gradient, under.own.batch.lengths)
        backward.append(_Under(under.own, under.entered, answer))

    def finish() -> None:
        under = backward.popleft()
        gradient = under.answer.result()
        if gradient is not None:
            under.entered.backward(gradient)

    try:
        for own in parts:
            enter(own)
            if len(forward) == in_flight:
                turn()
            if len(backward) > 1:
                finish()
        while forward:
            turn()
            if len(backward) > 1:
                finish()
        while backward:
            finish()
    finally:
        carrier.shutdown(wait=True, cancel_futures=True)
    return losses
