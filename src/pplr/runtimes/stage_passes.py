"""Training passes as a stage server is asked for them: what arrives is read and checked, and what leaves is written.

Both are apart from the computing between them, so that passes of several clients can be computed as one.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from pplr.backbones.shared_row import SharedRow
from pplr.errors import LimitError, WireError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Limits
from pplr.runtimes.stage_sessions import Session
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.stages.host import Asked
from pplr.stages.stage import StageCall

__all__ = ["TrainingPasses", "check_tokens", "refuse"]


class TrainingPasses:
    """Forward and backward passes of one client at a time, whole or in their parts.

    Args:
        tenancies: Of all clients.
    """

    def __init__(self, tenancies: Tenancies) -> None:
        self._tenancies = tenancies
        self._limits, self._backbone = tenancies.limits, tenancies.backbone
        self._states = Limits(
            width=self._backbone.hidden_size, max_rows=self._limits.max_rows, max_tokens=self._limits.max_tokens,
            max_message_bytes=self._limits.max_message_bytes,
        )  # fmt: skip

    def states_in(self, session: Session, message: Any) -> tuple[Tensor, Tensor]:
        """Read states, or their gradients, in the form that the session agreed on: (B, T, D), and the rows' lengths."""
        if message.wire != session.wire.number:
            raise WireError(
                f"states in form number {message.wire}, this session's are {session.wire.value}",
                cure="Send them as it was agreed at hello.",
            )
        return codec.decode_states(message, self._states, dtype=self._backbone.dtype, device=self._backbone.device)

    def _sequences_in(self, session: Session, message: Any) -> tuple[Tensor, Tensor]:
        if message.padded_left:
            raise WireError("whole sequences that are padded on the left", cure="Pad on the right.")
        return self.states_in(session, message)

    def forward(self, session: Session, request: Any) -> Any:
        """Run one client's batch, and keep its activations if a gradient is to come."""
        asked, lengths = self.forward_in(session, request)
        left = session.host.forward(
            session.name, asked.hidden_states, asked.call, keep_as=asked.step if request.keep else None
        )
        return self.forward_out(session, request, left, lengths)

    def forward_in(self, session: Session, request: Any) -> tuple[Asked, Tensor]:
        """Read what a forward pass is asked for, and its rows' lengths."""
        states, lengths = self._sequences_in(session, request.states)
        row = codec.row_of(request.states)
        if row is not None and not session.host.stage.takes_rows:
            raise WireError(
                "sequences in one row, which this model's blocks do not keep apart", cure="Send them padded."
            )
        tokens = states.shape[0] * states.shape[1] if row is None else row.padded
        if request.keep:
            if len(session.kept) >= self._limits.max_kept:
                raise LimitError(
                    "too many forward passes wait for a backward pass", cure="Send their gradients, or discard them."
                )
            others = self._tenancies.of(session.owner.client)
            waiting = sum(other.kept_tokens for other in others)
            check_tokens(waiting + tokens, self._limits.max_kept_tokens, "wait for a backward pass")
        call = StageCall(
            dropout_seed=request.dropout_seed if request.has_dropout_seed else None,
            adapter=request.adapter,
            lengths=lengths,
            row=row,
            gradient_wanted=not request.gradient_unwanted,
        )
        return Asked(session.name, request.step, states, call), lengths

    def forward_out(self, session: Session, request: Any, left: Tensor, lengths: Tensor) -> Any:
        """Write what left a forward pass, (B, T, D), and note what its gradient has to be like."""
        try:
            row = codec.row_of(request.states)
            reply = pb.StatesReply(states=codec.encode_states(left, lengths, session.wire, row=row))
        except WireError:
            if request.keep:
                session.host.forget(session.name, request.step)
            raise
        if request.keep:
            session.kept[request.step] = _layout(request.states)
        return reply

    def backward(self, session: Session, request: Any) -> Any:
        """Send one client's gradient back through the pass that it belongs to."""
        asked, lengths = self.backward_in(session, request)
        try:
            left = session.host.backward(session.name, asked.step, asked.hidden_states)
        except (WireError, RuntimeError):  # what it left behind is no gradient
            session.let_go()
            raise
        return self.backward_out(session, request, left, lengths)

    def backward_in(self, session: Session, request: Any) -> tuple[Asked, Tensor]:
        """Read a gradient, and its rows' lengths."""
        gradient, lengths = self._sequences_in(session, request.states)
        sent = session.kept.get(request.step)
        if sent is not None and sent != _layout(request.states):
            raise WireError(
                f"a gradient whose lengths are not those of step {request.step}", cure="Send the gradient of that step."
            )
        return Asked(session.name, request.step, gradient), lengths

    def backward_out(self, session: Session, request: Any, left: Tensor | None, lengths: Tensor) -> Any:
        """Write the gradient of what entered a pass, (B, T, D) if it is wanted, and count the pass as done."""
        try:
            row = codec.row_of(request.states)
            reply = pb.StatesReply()
            if left is not None:
                reply = pb.StatesReply(states=codec.encode_states(left, lengths, session.wire, row=row))
        except (WireError, RuntimeError):  # what it left behind is no gradient
            session.let_go()
            raise
        session.kept.pop(request.step, None)
        return reply


def check_tokens(tokens: int, most: int, what: str) -> None:
    """Refuse what would take a client over its tokens of one kind.

    Raises:
        LimitError: There are more than ``most``.
    """
    if tokens > most:
        raise LimitError(
            f"{tokens} tokens that {what}, at most {most} are granted to a client",
            cure="Use smaller batches (training.micro_batch_size, evaluation.batch_size, evaluation.beams).",
        )


def refuse(what: str, cure: str) -> NoReturn:
    """Refuse what a client sent.

    Raises:
        WireError: Always.
    """
    raise WireError(what, cure=cure)


def _layout(message: Any) -> tuple[int, ...] | SharedRow:
    """Tell what a gradient has to be like: the lengths of rows, or how sequences stand in one."""
    return codec.row_of(message) or tuple(message.lengths)
