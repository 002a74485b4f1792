"""The server's side of the cut, over gRPC: one frozen base, and for each authenticated client tenancies of its own.

Who calls is said by the certificate, never by the message. Every session counts its requests; the newest request may be
sent again and gets the same reply, so a retry never steps an optimizer twice. What is over a limit is refused before
anything is allocated. Nothing of a tensor is logged.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pplr.backbones.base import Backbone
from pplr.errors import (
    AdapterError,
    BackboneError,
    CutError,
    IdentityError,
    LimitError,
    PplrError,
    RunError,
    TransportError,
    UnknownSessionError,
    WireError,
)
from pplr.runtimes import stage_pb2 as pb
from pplr.runtimes.codec import Wire
from pplr.runtimes.framing import PROTOCOL, REFUSED, SERVICE, frames, joined, parsed
from pplr.runtimes.identity import Identity, ServerIdentity, identity_of
from pplr.runtimes.stage_batching import DynamicBatcher
from pplr.runtimes.stage_calls import OperatorCalls, SessionCalls
from pplr.runtimes.stage_metrics import StageMetrics
from pplr.runtimes.stage_passes import TrainingPasses
from pplr.runtimes.stage_sessions import ServerLimits
from pplr.runtimes.stage_state import StateStore
from pplr.runtimes.stage_tenancies import Tenancies
from pplr.runtimes.turns import Turns

__all__ = ["ServerLimits", "StageServer"]

_LOG = logging.getLogger("pplr.stage")
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (UnknownSessionError, grpc.StatusCode.NOT_FOUND),
    (LimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (IdentityError, grpc.StatusCode.PERMISSION_DENIED),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (AdapterError, grpc.StatusCode.INVALID_ARGUMENT),
    (CutError, grpc.StatusCode.INVALID_ARGUMENT),
    (BackboneError, grpc.StatusCode.INVALID_ARGUMENT),
    (PplrError, grpc.StatusCode.FAILED_PRECONDITION),
)
_TIDY_S = 5.0
_SMALL_BYTES = 1 << 16
_PING_MS = 30_000
"""How often a client may ask whether the server is there; it does so every minute."""


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
        wires: Forms in which states may travel.
        state: Folder in which tenancies are saved; ``None`` keeps them in memory alone.
        metrics_address: Loopback ``host:port`` for Prometheus; ``None`` is no such port.
        recompute: Whether blocks run again in the backward pass rather than keep their activations.

    Raises:
        TransportError: An address is not free, or not one to listen on.
    """

    def __init__(
        self,
        backbone: Backbone,
        identity: ServerIdentity,
        address: str,
        limits: ServerLimits | None = None,
        *,
        wires: tuple[Wire, ...] = tuple(Wire),
        state: Path | None = None,
        metrics_address: str | None = None,
        recompute: bool = False,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.metrics = StageMetrics()
        store = None if state is None else StateStore(state, _LOG.warning)
        self.tenancies = Tenancies(backbone, backbone.fingerprint(), self.limits, store, recompute=recompute)
        self._identity = identity
        passes = TrainingPasses(self.tenancies)
        self._session_calls = SessionCalls(self.tenancies, passes, wires)
        self._operator_calls = OperatorCalls(self.tenancies, time.monotonic, self.metrics.text)
        self._turns = Turns()
        self._batcher = DynamicBatcher(passes, self.tenancies, self._turns, self.metrics)
        self._calls: Counter[str] = Counter()
        self._registry = threading.Lock()
        self._draining = threading.Event()
        self._stopped = threading.Event()
        self._watch()
        self._server = self._listen(address)
        self.metrics_port, self._stop_metrics = 0, lambda: None
        if metrics_address is not None:
            self.metrics_port, self._stop_metrics = self.metrics.listen(metrics_address)

    def _watch(self) -> None:
        every = self.tenancies.all
        watched: dict[str, tuple[str, Callable[[], float]]] = {
            "tenancies": ("Adapters in memory.", lambda: len(every())),
            "clients": ("Clients with a tenancy.", lambda: len({own.owner.client for own in every()})),
            "rounds": ("Rounds of local training under way.", lambda: sum(own.in_round for own in every())),
            "kept_passes": ("Forward passes that wait for a gradient.", lambda: sum(len(own.kept) for own in every())),
            "open_caches": ("Open key-value caches.", lambda: sum(len(own.caches) for own in every())),
            "waiting_calls": ("Calls that wait for their turn.", lambda: self._turns.waiting),
        }
        for name, (meaning, read) in watched.items():
            self.metrics.watch(name, meaning, read)

    def _listen(self, address: str) -> grpc.Server:
        server = grpc.server(
            futures.ThreadPoolExecutor(self.limits.workers, thread_name_prefix="stage"),
            maximum_concurrent_rpcs=self.limits.max_clients * self.limits.concurrent_calls + self.limits.workers,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 2 << 20),
                ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS),
                ("grpc.max_concurrent_streams", self.limits.concurrent_calls),  # of one connection; more wait there
            ],
        )
        kinds: dict[str, type[Message]] = {"Hello": pb.HelloRequest}
        for answers in (self._session_calls.answers, self._operator_calls.answers):
            kinds |= {name: kind for name, (kind, _) in answers.items()}
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._serving(name, self._most(kind)))
            for name, kind in kinds.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = _Health(self._caller)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        credentials = grpc.ssl_server_credentials(
            [(self._identity.key_pem, self._identity.certificate_pem)],
            root_certificates=self._identity.ca_pem,
            require_client_auth=True,
        )
        try:
            self.port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise TransportError(f"cannot listen on {address}", cure="Choose a free port of this machine.") from error
        return server

    def _most(self, kind: type[Message]) -> int:
        """Say how long a request may be: one that holds no tensors is small."""
        parts = {field.message_type.name for field in kind.DESCRIPTOR.fields if field.message_type is not None}
        most = self.limits.max_message_bytes
        return most if parts & {"States", "Tensors"} else min(most, _SMALL_BYTES)

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        threading.Thread(target=self._tidy, name="stage-tidy", daemon=True).start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def drain(self, grace_s: float) -> bool:
        """Take no new sessions and rounds, and wait for those under way.

        Args:
            grace_s: Longest wait.

        Returns:
            Whether nothing is under way any more.
        """
        self._draining.set()
        self._health.enter_graceful_shutdown()
        until = time.monotonic() + grace_s
        while busy := any(own.in_round or own.caches for own in self.tenancies.all()):
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        return not busy

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, let those under way end within ``grace_s``, save every tenancy, and stop.

        Raises:
            StorageError: A tenancy could not be saved; the others were, but for those over a client's limit.
        """
        self._draining.set()
        self._stopped.set()
        self._server.stop(grace_s).wait()
        self._stop_metrics()
        troubles = []
        with self._turns.of(""):
            for session in self.tenancies.all() if self.tenancies.store is not None else []:
                try:
                    self.tenancies.save(session)
                except LimitError as error:
                    _LOG.warning("%s: %s", session.owner, error)
                except Exception as error:  # whatever is wrong with one, the others are saved
                    troubles.append(error)
        if troubles:
            raise troubles[0]

    def _tidy(self) -> None:
        every = min(_TIDY_S, self.limits.cache_ttl_s / 2)
        while not self._stopped.wait(every):
            try:
                with self._turns.of(""):
                    troubles = self.tenancies.tidy(time.monotonic())
            except Exception as error:  # the next time may be better
                troubles = [f"idle tenancies could not be let go: {type(error).__name__}"]
            for trouble in troubles:
                _LOG.warning("%s", trouble)

    # -- one call ---------------------------------------------------------------------------------------------

    def _serving(self, name: str, most: int) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
        def serve(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            client = ""
            try:
                identity = self._caller(context)
                client = identity.name
                with self._counted(client):
                    content = self._arrived(parts, most, context)
                    self.metrics.crossed(client, received=len(content))
                    started = time.monotonic()
                    reply = self._answer(name, identity, content)
                    self.metrics.took(name, time.monotonic() - started)
                self.metrics.crossed(client, sent=len(reply))
                self.metrics.request(client, name, "OK")
                yield from frames(reply)
            except _RefusedError as error:
                self._abort(context, client, name, error.code, str(error))
            except PplrError as error:
                code = next(code for kind, code in _CODES if isinstance(error, kind))
                text = str(error)
                if isinstance(error, RunError) and name not in self._operator_calls.answers:  # it names folders
                    _LOG.warning("%s of %s failed: %s", name, client, error)
                    text = "what the server has of you on its disk cannot be used. Ask its operator to read its log."
                self._abort(context, client, name, code, text)
            except Exception as error:  # gRPC would tell the caller its text
                if not context.is_active():
                    return
                _LOG.warning("%s of %s failed: %s", name, client, type(error).__name__)
                self._abort(
                    context, client, name, grpc.StatusCode.INTERNAL, f"{name} failed on the server. Tell its operator."
                )

        return serve

    def _abort(
        self, context: grpc.ServicerContext, client: str, name: str, code: grpc.StatusCode, message: str
    ) -> NoReturn:
        self.metrics.request(client, name, code.name)
        context.set_trailing_metadata(((REFUSED, "1"),))
        context.abort(code, " ".join(message.split())[:500])
        raise AssertionError("abort raises")

    def _caller(self, context: grpc.ServicerContext) -> Identity:
        """Read the name that the certificate gives, and refuse one that was revoked since the connection began."""
        certificates: list[bytes] = context.auth_context().get("x509_pem_cert", [])
        if len(certificates) != 1:
            raise _RefusedError(grpc.StatusCode.UNAUTHENTICATED, "no client certificate")
        identity = identity_of(certificates[0], ca_pem=self._identity.ca_pem)
        if self._identity.revocations.is_revoked(identity.serial):
            raise _RefusedError(grpc.StatusCode.PERMISSION_DENIED, "this certificate is revoked")
        return identity

    @contextmanager
    def _counted(self, client: str) -> Iterator[None]:
        """Grant a client so many calls at once."""
        with self._registry:
            if self._calls[client] >= self.limits.concurrent_calls:
                raise LimitError(
                    f"{self._calls[client]} calls of yours are under way, and no more are granted at once",
                    cure="Wait for their replies.",
                )
            self._calls[client] += 1
        try:
            yield
        finally:
            with self._registry:
                self._calls[client] -= 1
                if not self._calls[client]:
                    del self._calls[client]

    def _arrived(self, parts: Iterator[bytes], most: int, context: grpc.ServicerContext) -> bytes:
        """Take a message in, within the time that it may take."""
        timer = threading.Timer(self.limits.call_timeout_s, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return joined(parts, most)
        except grpc.RpcError as error:  # the sender went away, or took too long
            raise _RefusedError(grpc.StatusCode.CANCELLED, "the message did not arrive in time") from error
        finally:
            timer.cancel()

    def _answer(self, name: str, identity: Identity, content: bytes) -> bytes:
        if name in self._operator_calls.answers:
            if identity.role != "operator":
                raise _RefusedError(grpc.StatusCode.PERMISSION_DENIED, f"{name} is for operators")
            kind, handler = self._operator_calls.answers[name]
            asked = parsed(kind, content)
            with self._turns.of(identity.name):
                return handler(asked).SerializeToString()
        if identity.role != "client":
            raise _RefusedError(grpc.StatusCode.PERMISSION_DENIED, f"{name} is for clients")
        if name == "Hello":
            return self._hello(identity.name, parsed(pb.HelloRequest, content))
        kind, handler = self._session_calls.answers[name]
        request = parsed(kind, content)
        session = self.tenancies.session(identity.name, request.header.session)
        told = name, hashlib.sha256(content).digest()
        with session.lock:
            sequence, reply = request.header.sequence, session.reply
            if sequence == session.sequence and told == session.asked and reply is not None:
                return reply
            if sequence != session.sequence + 1:
                raise _RefusedError(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"request {sequence} of this session, expected {session.sequence + 1}",
                )
            if name == "BeginRound":
                self._refuse_while_draining()
            return self._batcher.carry_out(handler, session, request, told)

    def _hello(self, client: str, request: Any) -> bytes:
        if request.version != PROTOCOL:
            raise WireError(
                f"a client that speaks protocol {request.version[:20]!r}, this server speaks {PROTOCOL!r}",
                cure="Use the same version of pplr on both sides.",
            )
        self._refuse_while_draining()
        with self._turns.of(client):
            reply = self._session_calls.hello(client, request).SerializeToString()
        return bytes(reply)

    def _refuse_while_draining(self) -> None:
        if self._draining.is_set():
            raise _RefusedError(grpc.StatusCode.UNAVAILABLE, "the server is about to stop and begins nothing new")


class _Health(health.HealthServicer):
    """gRPC's health service, for whoever has a certificate that counts."""

    def __init__(self, caller: Callable[[grpc.ServicerContext], Identity]) -> None:
        super().__init__(experimental_non_blocking=False)
        self._caller = caller

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  (gRPC's name)
        self._let_in(context)
        return super().Check(request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext, **options: Any) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask again instead of watching")

    def _let_in(self, context: grpc.ServicerContext) -> None:
        try:
            self._caller(context)
        except (_RefusedError, IdentityError) as error:
            context.abort(getattr(error, "code", grpc.StatusCode.PERMISSION_DENIED), str(error)[:500])
