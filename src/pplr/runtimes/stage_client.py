"""The client's side of the cut, over gRPC: one more transport."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import grpc
import torch
from google.protobuf.message import Message
from torch import Tensor

from pplr import __version__
from pplr.backbones.adapters import AdapterState
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import TransportError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Limits, Wire
from pplr.runtimes.framing import SERVICE, frames, joined
from pplr.runtimes.identity import Kit
from pplr.stages.cut import CutPlan
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall
from pplr.stages.transport import Traffic

__all__ = ["GrpcTransport"]

_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class GrpcTransport:
    """One client's way to its middle stage in another process, by mutual TLS.

    Args:
        address: ``host:port`` of the stage server.
        kit: The client's startup kit.
        plan: The client's cut.
        base_sha256: Fingerprint of the base that the client's bundle was cut from.
        width: D.
        adapter: LoRA's settings.
        training: The optimizer's settings.
        dtype: Number format of hidden states on this side.
        device: Where they are wanted.
        wire: Number format between the two sides.
        timeout_s: Deadline of one attempt.
        attempts: Attempts of one call; a retry gets the reply of the first, and nothing happens twice.

    Raises:
        TransportError: The server cannot be reached, or refuses.
    """

    def __init__(
        self,
        address: str,
        kit: Kit,
        plan: CutPlan,
        *,
        base_sha256: str,
        width: int,
        adapter: AdapterConfig,
        training: TrainingConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        wire: Wire = Wire.FLOAT32,
        timeout_s: float = 120.0,
        attempts: int = 4,
    ) -> None:
        self.traffic = Traffic()
        self._address, self._wire, self._dtype, self._device = address, wire, dtype, device
        self._timeout_s, self._attempts, self._middle = timeout_s, attempts, plan.middle
        credentials = grpc.ssl_channel_credentials(kit.ca_pem, kit.key_pem, kit.certificate_pem)
        self._channel = grpc.secure_channel(
            address, credentials, options=[("grpc.max_receive_message_length", 2 << 20)]
        )
        self._sequence, self._session = 0, 0
        self._max_bytes = 256 * 2**20
        hello = pb.HelloRequest(
            version=__version__,
            base_sha256=base_sha256,
            input_layers=plan.input_layers,
            output_layers=plan.output_layers,
            total_layers=plan.total_layers,
            wire=wire.number,
            adapter_json=adapter.model_dump_json(),
            training_json=training.model_dump_json(),
        )
        granted = self._exchange("Hello", hello, pb.HelloReply)
        self._session, self._max_bytes = granted.session, granted.max_message_bytes
        self._limits = Limits(width=width, max_rows=granted.max_batch, max_tokens=granted.max_tokens,
                              max_message_bytes=granted.max_message_bytes)  # fmt: skip

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    # -- one call ---------------------------------------------------------------------------------------------

    def _header(self) -> Any:
        self._sequence += 1
        return pb.Header(session=self._session, sequence=self._sequence)

    def _exchange(self, name: str, request: Message, kind: Any) -> Any:
        """Send a request, again if need be, and read its reply."""
        content = request.SerializeToString()
        call = self._channel.stream_stream(f"/{SERVICE}/{name}")
        for attempt in range(1, self._attempts + 1):
            try:
                reply = joined(call(frames(content), timeout=self._timeout_s), self._max_bytes)
                return kind.FromString(reply)
            except grpc.RpcError as error:
                code, details = error.code(), error.details() or ""
                if code in _RETRIED and attempt < self._attempts:
                    time.sleep(0.1 * 3 ** (attempt - 1))
                    continue
                if code in _RETRIED:
                    raise TransportError(
                        f"the stage server {self._address} does not answer ({code.name.lower()}: {details})",
                        cure="See that it runs and that its certificate names this address, then go on with --resume.",
                    ) from error
                self._sequence -= name != "Hello"  # a refused request is not counted
                raise TransportError(
                    f"the stage server refused {name} ({code.name.lower()}): {details}",
                    cure="Correct what it names, then go on with --resume.",
                ) from error
        raise TransportError("no attempt was made", cure="Allow at least one attempt.")

    def _send(self, states: Tensor, lengths: Tensor, *, padded_left: bool = False) -> Any:
        message = codec.encode_states(states, lengths, self._wire, padded_left=padded_left)
        self.traffic.bytes_up += len(message.data) + len(message.scales)
        return message

    def _received(self, message: Any) -> Tensor:
        self.traffic.bytes_down += len(message.data) + len(message.scales)
        states, _ = codec.decode_states(message, self._limits, dtype=self._dtype, device=torch.device(self._device))
        return states

    # -- the transport ----------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, lengths: Tensor, call: StageCall, *, keep_as: int | None) -> Tensor:
        """Run the middle stage: (B, T, D) -> (B, T, D); padding comes back as zeros."""
        request = pb.ForwardRequest(
            header=self._header(),
            states=self._send(hidden_states, lengths),
            step=keep_as or 0,
            keep=keep_as is not None,
            adapter=call.adapter,
            has_dropout_seed=call.dropout_seed is not None,
            dropout_seed=call.dropout_seed or 0,
        )
        return self._received(self._exchange("Forward", request, pb.StatesReply).states)

    def backward(self, step: int, grad_hidden_states: Tensor, lengths: Tensor) -> Tensor:
        """Send a gradient back: (B, T, D) -> (B, T, D)."""
        request = pb.BackwardRequest(header=self._header(), step=step, states=self._send(grad_hidden_states, lengths))
        return self._received(self._exchange("Backward", request, pb.StatesReply).states)

    def _simple(self, name: str, kind: Any = pb.Done) -> Any:
        return self._exchange(name, pb.SimpleRequest(header=self._header()), kind)

    def discard(self) -> None:
        """Let go of kept activations and caches."""
        self._simple("Discard")

    def begin_round(self, total_steps: int, objective: LocalObjective, anchor: AdapterState | None) -> None:
        """Prepare a round of local training."""
        own = self._own(anchor) if anchor is not None and objective.proximal_mu > 0 else None
        request = pb.BeginRoundRequest(
            header=self._header(),
            total_steps=total_steps,
            proximal_mu=objective.proximal_mu,
            train_a=objective.train_a,
            has_anchor=own is not None,
            anchor=codec.encode_tensors(own or {}),
        )
        self._exchange("BeginRound", request, pb.Done)

    def _own(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the tensors of the middle blocks; nothing of the client's own layers is sent by this way."""
        return {
            name: tensor
            for name, tensor in state.items()
            if (found := _BLOCK.search(name)) is None or int(found[1]) in self._middle
        }

    def gradient_norm_squared(self) -> float:
        """Squared gradient norm of the middle adapter."""
        return float(self._exchange("GradientNorm", pb.NormRequest(header=self._header()), pb.NormReply).squared)

    def optimizer_step(self, scale: float) -> None:
        """Step the middle optimizer once."""
        self._exchange("OptimizerStep", pb.StepRequest(header=self._header(), scale=scale), pb.Done)

    def end_round(self) -> None:
        """Let go of what only the round needed."""
        self._simple("EndRound")

    def open_cache(self) -> int:
        """Open a key-value cache in the middle stage."""
        return int(self._simple("OpenCache", pb.CacheReply).cache)

    def decode(self, hidden_states: Tensor, call: StageCall, cache: int) -> Tensor:
        """Run the middle stage and extend a cache: (B, T, D) -> (B, T, D)."""
        tokens = hidden_states.shape[1]
        mask = call.attention_mask
        if mask is None:
            raise TransportError("decoding without an attention mask", cure="Give the mask of the whole sequence.")
        total = codec.lengths_of_left_mask(mask)
        new = mask[:, -tokens:].sum(1)
        request = pb.DecodeRequest(
            header=self._header(),
            cache=cache,
            states=self._send(hidden_states, new, padded_left=True),
            total_tokens=mask.shape[1],
            total_lengths=total.tolist(),
        )
        return self._received(self._exchange("Decode", request, pb.StatesReply).states)

    def reorder_cache(self, cache: int, rows: Tensor) -> None:
        """Keep the given rows of a cache."""
        request = pb.ReorderRequest(header=self._header(), cache=cache, rows=rows.tolist())
        self._exchange("ReorderCache", request, pb.Done)

    def close_cache(self, cache: int) -> None:
        """Let go of a cache."""
        self._exchange("CloseCache", pb.CacheRequest(header=self._header(), cache=cache), pb.Done)

    def adapter(self) -> AdapterState:
        """Read the middle adapter."""
        return self._read("Adapter", "the middle adapter")

    def set_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle adapter, or some of its tensors."""
        request = pb.TensorsRequest(header=self._header(), tensors=codec.encode_tensors(self._own(state)))
        self._exchange("SetAdapter", request, pb.Done)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Read the middle optimizer's state."""
        return self._read("OptimizerState", "the middle optimizer's state")

    def _read(self, name: str, whose: str) -> dict[str, Tensor]:
        tensors = self._simple(name, pb.TensorsReply).tensors
        return codec.decode_tensors(tensors, None, whose=whose, max_bytes=self._max_bytes, max_norm=None)

    def restore_optimizer(self, state: Mapping[str, Tensor]) -> None:
        """Write the middle optimizer's state."""
        request = pb.TensorsRequest(header=self._header(), tensors=codec.encode_tensors(self._own(state)))
        self._exchange("RestoreOptimizer", request, pb.Done)
