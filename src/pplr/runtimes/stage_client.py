"""The client's side of the cut, over gRPC: one more transport."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from google.protobuf.message import Message
from torch import Tensor

from pplr.backbones.adapters import AdapterState, block_of
from pplr.backbones.shared_row import SharedRow
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import ServerLostError, TransportError, WireError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Limits, Wire
from pplr.runtimes.framing import PROTOCOL
from pplr.runtimes.stage_channel import StageChannel
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.stages.transport import Traffic

__all__ = ["GrpcTransport"]

_MAX_REPLY = 256 << 20


class GrpcTransport:
    """One tenancy's way to its middle stage in another process, by mutual TLS.

    Args:
        channel: The connection to the stage server.
        tenant: A name below the client's own; a newer session of the same name takes the place of an older one.
        plan: The client's cut.
        base_sha256: Fingerprint of the base that the client's bundle was cut from.
        width: D.
        adapter: LoRA's settings.
        training: The optimizer's settings.
        dtype: Number format of hidden states on this side.
        device: Where they are wanted.
        wires: Number formats between the two sides that are acceptable, the preferred one first.
        keep: Go on with the adapter and optimizer that the server has of this tenancy, in memory or on disk.

    Attributes:
        wire: The number format that the server granted.
        kept: Whether the server had a tenancy to go on with.

    Raises:
        TransportError: The server cannot be reached, or refuses.
    """

    def __init__(
        self,
        channel: StageChannel,
        tenant: str,
        plan: CutPlan,
        *,
        base_sha256: str,
        width: int,
        adapter: AdapterConfig,
        training: TrainingConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        wires: Sequence[Wire] = (Wire.FLOAT32,),
        keep: bool = False,
    ) -> None:
        self.traffic = Traffic()
        self._channel, self._dtype, self._device, self._middle = channel, dtype, device, plan.middle
        self._sequence, self._session, self._max_bytes = 0, 0, _MAX_REPLY
        self._unanswered = False  # whether the newest request may or may not have been carried out
        self._rows: dict[int, list[int] | None] = {}  # of each open cache, those to keep at its next use
        self._kept: dict[int, StageCall] = {}  # how each kept step was sent
        hello = pb.HelloRequest(
            version=PROTOCOL,
            base_sha256=base_sha256,
            input_layers=plan.input_layers,
            output_layers=plan.output_layers,
            total_layers=plan.total_layers,
            wires=[wire.number for wire in wires],
            adapter_json=adapter.model_dump_json(),
            training_json=training.model_dump_json(),
            tenant=tenant,
            attempt=secrets.randbits(63) | 1,
            keep=keep,
        )
        granted = channel.call("Hello", hello, pb.HelloReply, max_bytes=_MAX_REPLY)
        self.wire, self.kept = Wire.of(granted.wire), bool(granted.kept)
        self._session, self._max_bytes = granted.session, granted.max_message_bytes
        self._limits = Limits(width=width, max_rows=granted.max_batch, max_tokens=granted.max_tokens,
                              max_message_bytes=granted.max_message_bytes)  # fmt: skip

    # -- one call ---------------------------------------------------------------------------------------------

    def _header(self) -> Any:
        self._sequence += 1
        self._unanswered = True
        return pb.Header(session=self._session, sequence=self._sequence)

    def _exchange(self, name: str, request: Message, kind: Any) -> Any:
        """Send a request and read its reply; one that was refused is not counted."""
        try:
            reply = self._channel.call(name, request, kind, max_bytes=self._max_bytes)
        except TransportError as error:
            if not isinstance(error, ServerLostError | WireError):
                self._sequence -= 1
                self._unanswered = False
            raise
        self._unanswered = False
        return reply

    def _let_go(self, name: str, kind: Any = pb.SimpleRequest, **fields: Any) -> None:
        """Have the server let go of something; when it is lost or Ctrl-C came, what ends the run speaks for itself."""
        if self._unanswered:
            self._try(name, kind, **fields)
        else:
            self._exchange(name, kind(header=self._header(), **fields), pb.Done)

    def _try(self, name: str, kind: Any = pb.SimpleRequest, **fields: Any) -> None:
        """Ask once, also when nobody knows whether the request before was carried out, and pass over a failure."""
        for sequence in (self._sequence + 1, self._sequence):  # it was; or it was not, and its number is free
            request = kind(header=pb.Header(session=self._session, sequence=sequence), **fields)
            try:
                self._channel.call(name, request, pb.Done, max_bytes=self._max_bytes, again=False)
            except ServerLostError:
                return
            except TransportError:
                continue
            self._sequence, self._unanswered = sequence, False
            return

    def _send(self, states: Tensor, lengths: Tensor, *, padded_left: bool = False, row: SharedRow | None = None) -> Any:
        return codec.encode_states(states, lengths, self.wire, padded_left=padded_left, row=row)

    def _received(self, sent: Any, message: Any) -> Tensor:
        self.traffic.bytes_up += len(sent.data) + len(sent.scales)
        self.traffic.bytes_down += len(message.data) + len(message.scales)
        states, _ = codec.decode_states(message, self._limits, dtype=self._dtype, device=torch.device(self._device))
        if codec.row_of(message) != codec.row_of(sent):
            raise WireError(
                "states that do not stand as those that were sent", cure="Use the same version on both sides."
            )
        return states

    # -- the transport ----------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage: (B, T, D) -> (B, T, D); padding comes back as zeros."""
        states = self._send(hidden_states, lengths, row=call.row)
        if keep_as is not None:
            self._kept[keep_as] = call
        request = pb.ForwardRequest(
            header=self._header(),
            states=states,
            step=keep_as or 0,
            keep=keep_as is not None,
            adapter=call.adapter,
            has_dropout_seed=call.dropout_seed is not None,
            dropout_seed=call.dropout_seed or 0,
            gradient_unwanted=not call.gradient_wanted,
        )
        return self._received(states, self._exchange("Forward", request, pb.StatesReply).states)

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor | None:
        """Send a gradient back: (B, T, D) -> (B, T, D), if that pass wants one."""
        call = self._kept.pop(step, StageCall())
        states = self._send(grad_hidden_states, lengths, row=call.row)
        request = pb.BackwardRequest(header=self._header(), step=step, states=states)
        reply = self._exchange("Backward", request, pb.StatesReply)
        if call.gradient_wanted:
            return self._received(states, reply.states)
        if reply.HasField("states"):
            raise WireError("a gradient that was not asked for", cure="Use the same version on both sides.")
        self.traffic.bytes_up += len(states.data) + len(states.scales)
        return None

    def _simple(self, name: str, kind: Any = pb.Done) -> Any:
        return self._exchange(name, pb.SimpleRequest(header=self._header()), kind)

    def discard(self) -> None:
        """Let go of kept activations, gradients and caches."""
        self._rows.clear()
        self._kept.clear()
        self._let_go("Discard")

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training."""
        own = self._own(anchor) if anchor is not None and objective.proximal_mu > 0 else None
        tensors = codec.encode_tensors(own or {})
        request = pb.BeginRoundRequest(
            header=self._header(),
            total_steps=total_steps,
            proximal_mu=objective.proximal_mu,
            train_a=objective.train_a,
            has_anchor=own is not None,
            anchor=tensors,
        )
        self._exchange("BeginRound", request, pb.Done)

    def _own(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the tensors of the middle blocks; nothing of the client's own layers is sent by this way."""
        return {name: tensor for name, tensor in state.items() if name == "steps" or block_of(name) in self._middle}

    def gradient_norm_squared(self) -> float:
        """Squared gradient norm of the middle adapter."""
        return float(self._exchange("GradientNorm", pb.NormRequest(header=self._header()), pb.NormReply).squared)

    def optimizer_step(self, scale: float) -> None:
        """Step the middle optimizer once."""
        self._exchange("OptimizerStep", pb.StepRequest(header=self._header(), scale=scale), pb.Done)

    def end_round(self) -> None:
        """Let go of what only the round needed."""
        self._let_go("EndRound")

    def open_cache(self) -> int:
        """Open a key-value cache in the middle stage."""
        cache = int(self._simple("OpenCache", pb.CacheReply).cache)
        self._rows[cache] = None
        return cache

    def _check_open(self, cache: int) -> None:
        if cache not in self._rows:
            raise TransportError(f"no open cache {cache}", cure="Open one, and do not use it after closing.")

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage and extend a cache: (B, T, D) -> (B, T, D); padding comes back as zeros."""
        self._check_open(cache)
        tokens = hidden_states.shape[1]
        mask, new = call.attention_mask, call.new_lengths(tokens)
        if mask is None:
            raise TransportError("decoding without an attention mask", cure="Give the mask of the whole sequence.")
        told = mask.dim() == 4
        total = () if told else codec.lengths_of_left_mask(mask).tolist()
        states = self._send(hidden_states, new, padded_left=True)
        request = pb.DecodeRequest(
            header=self._header(),
            cache=cache,
            states=states,
            total_tokens=mask.shape[-1],
            total_lengths=total,
            rows=self._rows[cache] or (),
            sees=codec.encode_sees(mask[:, 0]) if told else b"",
        )
        reply = self._exchange("Decode", request, pb.StatesReply)
        self._rows[cache] = None
        return self._received(states, reply.states)

    def reorder_cache(self, cache: int, rows: Tensor) -> None:
        """Keep the given rows of a cache; the server is told together with the next tokens, in one message."""
        self._check_open(cache)
        before, chosen = self._rows[cache], rows.tolist()
        self._rows[cache] = chosen if before is None else [before[row] for row in chosen]

    def append_rows(self, cache: int, other: int, rows: Tensor, skip: int) -> None:
        """Append rows of another open cache; rows that are not to be kept are let go of by the same message."""
        self._check_open(cache)
        self._check_open(other)
        kept, theirs = self._rows[cache], self._rows[other]
        chosen = [int(row) if theirs is None else theirs[row] for row in rows.tolist()]
        request = pb.AppendRequest(
            header=self._header(), cache=cache, other=other, rows=chosen, keep=kept or (), skip=skip
        )
        self._exchange("AppendRows", request, pb.Done)
        self._rows[cache] = None

    def close_cache(self, cache: int) -> None:
        """Let go of a cache."""
        self._check_open(cache)
        del self._rows[cache]
        self._let_go("CloseCache", pb.CacheRequest, cache=cache)

    def adapter(self) -> AdapterState:
        """Read the middle adapter."""
        return self._read("Adapter", "the middle adapter")

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle adapter, or some of its tensors."""
        self._write("SetAdapter", state)

    def take_adapter(self, label: str) -> None:
        """Have the middle adapter become the one that the server's operator offers under a label."""
        self._exchange("TakeAdapter", pb.TakeRequest(header=self._header(), label=label), pb.Done)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Read the middle optimizer's state."""
        return self._read("OptimizerState", "the middle optimizer's state")

    def _write(self, name: str, state: Mapping[str, Tensor]) -> None:
        tensors = codec.encode_tensors(self._own(state))  # before the header: what cannot be sent is not counted
        self._exchange(name, pb.TensorsRequest(header=self._header(), tensors=tensors), pb.Done)

    def _read(self, name: str, whose: str) -> dict[str, Tensor]:
        tensors = self._simple(name, pb.TensorsReply).tensors
        return codec.decode_tensors(tensors, None, whose=whose, max_bytes=self._max_bytes, max_norm=None)

    def restore_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle optimizer's state."""
        self._write("RestoreOptimizer", state)

    def save(self) -> None:
        """Have the server write the middle adapter and optimizer to its disk."""
        self._simple("Save")

    def restore(self) -> None:
        """Have the server put the middle adapter and optimizer back to where they were saved last."""
        self._simple("Restore")

    def leave(self) -> None:
        """Let go of everything that the server holds in memory; one that does not answer lets go by itself later."""
        self._try("Leave")
