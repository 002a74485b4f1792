"""The server's side of the cut, over gRPC: one frozen base, and for each authenticated client a tenancy of its own.

Who calls is said by the certificate, never by the message. Every session counts its requests; the newest request may be
sent again and gets the same reply, so a retry never steps an optimizer twice. What is over a limit is refused before
anything is allocated. Nothing of a tensor is logged.
"""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import torch
from google.protobuf.message import DecodeError, Message
from torch import Tensor

from pplr.backbones.base import Backbone
from pplr.config import AdapterConfig, TrainingConfig
from pplr.errors import AdapterError, CutError, IdentityError, PplrError, TransportError, WireError
from pplr.runtimes import codec
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Limits, Wire
from pplr.runtimes.framing import SERVICE, frames, joined
from pplr.runtimes.identity import Identity, ServerIdentity, identity_of
from pplr.stages.cut import CutPlan
from pplr.stages.host import StageHost
from pplr.stages.optimizer import LocalObjective
from pplr.stages.stage import StageCall

__all__ = ["ServerLimits", "StageServer"]


@dataclass(frozen=True)
class ServerLimits:
    """What the server grants.

    Args:
        max_rows: Rows of a batch, or of a cache.
        max_tokens: Tokens of a sequence.
        max_message_bytes: Bytes of one request, over all its frames.
        max_caches: Open key-value caches of one client.
        max_kept: Forward passes of one client that wait for their backward pass.
        max_clients: Clients with a tenancy.
        concurrent_calls: Calls of one client at once.
        workers: Calls of all clients at once.
        call_timeout_s: Longest time that a call may take to arrive.
        cache_ttl_s: A cache that nobody used for so long is closed.
    """

    max_rows: int = 512
    max_tokens: int = 4096
    max_message_bytes: int = 256 * 2**20
    max_caches: int = 4
    max_kept: int = 4
    max_clients: int = 256
    concurrent_calls: int = 2
    workers: int = 16
    call_timeout_s: float = 120.0
    cache_ttl_s: float = 600.0


@dataclass
class _Session:
    """One client's session: its side of the cut, and where its count of requests stands."""

    number: int
    client: str
    host: StageHost
    wire: Wire
    sequence: int = 0
    reply: bytes | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    kept: set[int] = field(default_factory=set)
    caches: dict[int, float] = field(default_factory=dict)


class _RefusedError(Exception):
    """A refusal with gRPC's status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class StageServer:
    """Serves the middle blocks of one base to many clients.

    Args:
        backbone: The base, whole or a server's bundle.
        identity: The server's key, certificate, certificate authority and revocation list.
        address: ``host:port`` to listen on; port 0 takes a free one.
        limits: What is granted.
    """

    def __init__(
        self, backbone: Backbone, identity: ServerIdentity, address: str, limits: ServerLimits | None = None
    ) -> None:
        self.limits = limits or ServerLimits()
        self.requests: Counter[tuple[str, str]] = Counter()
        self._backbone = backbone
        self._identity = identity
        self._base = backbone.fingerprint()
        self._states = Limits(
            width=backbone.hidden_size, max_rows=self.limits.max_rows, max_tokens=self.limits.max_tokens,
            max_message_bytes=self.limits.max_message_bytes,
        )  # fmt: skip
        self._hosts: dict[str, StageHost] = {}
        self._home: dict[str, str] = {}
        self._sessions: dict[str, _Session] = {}
        self._calls: Counter[str] = Counter()
        self._compute = threading.Lock()
        self._registry = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(self.limits.workers, thread_name_prefix="stage"),
            maximum_concurrent_rpcs=self.limits.workers,
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 2 << 20)],
        )
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._serving(name)) for name in ("Hello", *self._answers())
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        credentials = grpc.ssl_server_credentials(
            [(identity.key_pem, identity.certificate_pem)],
            root_certificates=identity.ca_pem,
            require_client_auth=True,
        )
        try:
            self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise TransportError(f"cannot listen on {address}", cure="Choose a free port of this machine.") from error

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, let those under way end within ``grace_s``, and stop."""
        self._server.stop(grace_s).wait()

    def wait(self) -> None:
        """Block until the server stops."""
        self._server.wait_for_termination()

    # -- one call ---------------------------------------------------------------------------------------------

    def _answers(self) -> dict[str, tuple[type[Message], Callable[[_Session, Any], Message]]]:
        return {
            "Forward": (pb.ForwardRequest, self._forward),
            "Backward": (pb.BackwardRequest, self._backward),
            "Discard": (pb.SimpleRequest, self._discard),
            "BeginRound": (pb.BeginRoundRequest, self._begin_round),
            "GradientNorm": (pb.NormRequest, self._gradient_norm),
            "OptimizerStep": (pb.StepRequest, self._optimizer_step),
            "EndRound": (pb.SimpleRequest, self._end_round),
            "OpenCache": (pb.SimpleRequest, self._open_cache),
            "Decode": (pb.DecodeRequest, self._decode),
            "ReorderCache": (pb.ReorderRequest, self._reorder_cache),
            "CloseCache": (pb.CacheRequest, self._close_cache),
            "Adapter": (pb.SimpleRequest, self._adapter),
            "SetAdapter": (pb.TensorsRequest, self._set_adapter),
            "OptimizerState": (pb.SimpleRequest, self._optimizer_state),
            "RestoreOptimizer": (pb.TensorsRequest, self._restore_optimizer),
        }

    def _serving(self, name: str) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
        def serve(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            client = ""
            try:
                client = self._caller(context).name
                with self._registry:
                    if self._calls[client] >= self.limits.concurrent_calls:
                        raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
                    self._calls[client] += 1
                try:
                    reply = self._answer(name, client, self._arrived(parts, context))
                finally:
                    with self._registry:
                        self._calls[client] -= 1
                self.requests[client, name] += 1
                yield from frames(reply)
            except _RefusedError as error:
                _abort(context, error.code, str(error))
            except IdentityError as error:
                _abort(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
            except (WireError, AdapterError, CutError, DecodeError) as error:
                _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except PplrError as error:
                _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))

        return serve

    def _caller(self, context: grpc.ServicerContext) -> Identity:
        """Read the name that the certificate gives, and refuse one that was revoked since the connection began."""
        certificates: list[bytes] = context.auth_context().get("x509_pem_cert", [])
        if len(certificates) != 1:
            raise _RefusedError(grpc.StatusCode.UNAUTHENTICATED, "no client certificate")
        identity = identity_of(certificates[0], ca_pem=self._identity.ca_pem)
        if self._identity.revocations.is_revoked(identity.serial):
            raise _RefusedError(grpc.StatusCode.PERMISSION_DENIED, "this certificate is revoked")
        return identity

    def _arrived(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Take a message in, within the time that it may take."""
        timer = threading.Timer(self.limits.call_timeout_s, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return joined(parts, self.limits.max_message_bytes)
        finally:
            timer.cancel()

    def _answer(self, name: str, client: str, content: bytes) -> bytes:
        if name == "Hello":
            return self._hello(client, pb.HelloRequest.FromString(content)).SerializeToString()
        kind, handler = self._answers()[name]
        request: Any = kind.FromString(content)
        session = self._sessions.get(client)
        if session is None or session.number != request.header.session:
            raise _RefusedError(grpc.StatusCode.FAILED_PRECONDITION, "this is not a session of yours; say hello again")
        with session.lock:
            sequence = request.header.sequence
            if sequence == session.sequence and session.reply is not None:
                return session.reply
            if sequence != session.sequence + 1:
                raise _RefusedError(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"request {sequence} of this session, expected {session.sequence + 1}",
                )
            with self._compute:
                self._expire(session)
                try:
                    reply = handler(session, request).SerializeToString()
                except (RuntimeError, IndexError, ValueError) as error:  # what torch says of shapes that do not meet
                    raise _RefusedError(
                        grpc.StatusCode.INVALID_ARGUMENT, "the request does not fit what is kept for you"
                    ) from error
            session.sequence, session.reply = sequence, reply
            return reply

    def _expire(self, session: _Session) -> None:
        """Close caches that nobody used for long."""
        for cache, used in list(session.caches.items()):
            if time.monotonic() - used > self.limits.cache_ttl_s:
                session.host.close_cache(session.client, cache)
                del session.caches[cache]

    # -- what can be asked ------------------------------------------------------------------------------------

    def _hello(self, client: str, request: Any) -> Any:
        if request.base_sha256 != self._base:
            raise _RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION, "your bundle was cut from another base than this server's"
            )
        plan = CutPlan(request.input_layers, request.output_layers, self._backbone.total_layers)
        try:
            adapter = AdapterConfig.model_validate_json(request.adapter_json)
            training = TrainingConfig.model_validate_json(request.training_json)
        except ValueError as error:
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "unreadable adapter or training settings") from error
        if adapter.rank > self._backbone.hidden_size:
            raise _RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"an adapter of rank {adapter.rank}, at most {self._backbone.hidden_size} is granted",
            )
        key = json.dumps([plan.input_layers, plan.output_layers, adapter.model_dump(), training.model_dump()])
        with self._registry, self._compute:
            if client not in self._home and len(self._home) >= self.limits.max_clients:
                raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server has as many clients as it may")
            if key not in self._hosts:
                self._hosts[key] = StageHost(self._backbone, plan, adapter, training)
            host = self._hosts[key]
            before = self._home.get(client)
            if before is not None and before != key:
                self._hosts[before].dismiss(client)
                del self._home[client]
                if before not in self._home.values():
                    del self._hosts[before]
                before = None
            if before is None:
                host.admit(client, {name: torch.zeros(shape) for name, shape in host.stage.shapes.items()})
                self._home[client] = key
            host.discard(client)
            session = _Session(secrets.randbits(63), client, host, Wire.of(request.wire))
            self._sessions[client] = session
        return pb.HelloReply(
            session=session.number,
            wire=request.wire,
            max_message_bytes=self.limits.max_message_bytes,
            max_batch=self.limits.max_rows,
            max_tokens=self.limits.max_tokens,
        )

    def _states_in(self, message: Any) -> tuple[Any, Any]:
        return codec.decode_states(message, self._states, dtype=self._backbone.dtype, device=self._backbone.device)

    def _forward(self, session: _Session, request: Any) -> Any:
        states, lengths = self._states_in(request.states)
        if request.keep and len(session.kept) >= self.limits.max_kept:
            raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many forward passes wait for a backward pass")
        call = StageCall(
            dropout_seed=request.dropout_seed if request.has_dropout_seed else None, adapter=request.adapter
        )
        left = session.host.forward(session.client, states, call, keep_as=request.step if request.keep else None)
        if request.keep:
            session.kept.add(request.step)
        return pb.StatesReply(states=codec.encode_states(left, lengths, session.wire))

    def _backward(self, session: _Session, request: Any) -> Any:
        gradient, lengths = self._states_in(request.states)
        session.kept.discard(request.step)
        left = session.host.backward(session.client, request.step, gradient)
        return pb.StatesReply(states=codec.encode_states(left, lengths, session.wire))

    def _discard(self, session: _Session, request: Any) -> Any:
        session.host.discard(session.client)
        session.kept.clear()
        session.caches.clear()
        return pb.Done()

    def _begin_round(self, session: _Session, request: Any) -> Any:
        anchor = None
        if request.has_anchor:
            anchor = self._tensors_in(session, request.anchor, session.host.stage.shapes, "anchor")
        if not (math.isfinite(request.proximal_mu) and request.proximal_mu >= 0 and request.total_steps >= 1):
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "a round of no steps, or a pull that is no strength")
        objective = LocalObjective(proximal_mu=request.proximal_mu, train_a=request.train_a)
        session.host.begin_round(session.client, request.total_steps, objective, anchor)
        return pb.Done()

    def _gradient_norm(self, session: _Session, request: Any) -> Any:
        return pb.NormReply(squared=session.host.gradient_norm_squared(session.client))

    def _optimizer_step(self, session: _Session, request: Any) -> Any:
        if not 0.0 <= request.scale <= 1.0:
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "a clipping factor outside [0, 1]")
        session.host.optimizer_step(session.client, request.scale)
        return pb.Done()

    def _end_round(self, session: _Session, request: Any) -> Any:
        session.host.end_round(session.client)
        return pb.Done()

    def _open_cache(self, session: _Session, request: Any) -> Any:
        if len(session.caches) >= self.limits.max_caches:
            raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many open caches")
        cache = session.host.open_cache(session.client)
        session.caches[cache] = time.monotonic()
        return pb.CacheReply(cache=cache)

    def _decode(self, session: _Session, request: Any) -> Any:
        states, lengths = self._states_in(request.states)
        if request.total_tokens > self.limits.max_tokens or len(request.total_lengths) != len(states):
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "lengths that do not fit the rows")
        mask = codec.left_mask(request.total_tokens, request.total_lengths).to(states.device)
        call = StageCall(attention_mask=mask, position_ids=codec.positions_of(mask, states.shape[1]))
        left = session.host.decode(session.client, states, call, request.cache)
        session.caches[request.cache] = time.monotonic()
        return pb.StatesReply(states=codec.encode_states(left, lengths, session.wire, padded_left=True))

    def _reorder_cache(self, session: _Session, request: Any) -> Any:
        if len(request.rows) > self.limits.max_rows:
            raise _RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many rows")
        rows = torch.tensor(list(request.rows), dtype=torch.long, device=self._backbone.device)
        try:
            session.host.reorder_cache(session.client, request.cache, rows)
        except IndexError as error:
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "a row that the cache has not") from error
        return pb.Done()

    def _close_cache(self, session: _Session, request: Any) -> Any:
        session.host.close_cache(session.client, request.cache)
        session.caches.pop(request.cache, None)
        return pb.Done()

    def _adapter(self, session: _Session, request: Any) -> Any:
        return pb.TensorsReply(tensors=codec.encode_tensors(session.host.adapter(session.client)))

    def _tensors_in(
        self, session: _Session, message: Any, expected: Mapping[str, tuple[int, ...]] | None, what: str
    ) -> dict[str, Tensor]:
        return codec.decode_tensors(
            message,
            expected,
            whose=f"client {session.client}'s {what}",
            max_bytes=self.limits.max_message_bytes,
            max_norm=None,
        )

    def _set_adapter(self, session: _Session, request: Any) -> Any:
        given = {tensor.name for tensor in request.tensors.tensors}
        shapes = {name: shape for name, shape in session.host.stage.shapes.items() if name in given}
        session.host.set_adapter(session.client, self._tensors_in(session, request.tensors, shapes, "middle adapter"))
        return pb.Done()

    def _optimizer_state(self, session: _Session, request: Any) -> Any:
        return pb.TensorsReply(tensors=codec.encode_tensors(session.host.optimizer_state(session.client)))

    def _restore_optimizer(self, session: _Session, request: Any) -> Any:
        tensors = self._tensors_in(session, request.tensors, None, "optimizer state")
        if "steps" not in tensors or any(
            bool((tensor < 0).any()) for name, tensor in tensors.items() if not name.startswith("exp_avg.")
        ):
            raise _RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, "an optimizer state without steps, or with negative ones or moments"
            )
        session.host.restore_optimizer(session.client, tensors)
        return pb.Done()


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, " ".join(message.split())[:500])
    raise RuntimeError("abort raises")
