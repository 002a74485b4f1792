"""One process's connection to a stage server: mutual TLS, deadlines, and retries that end."""

from __future__ import annotations

import random
import time
from typing import Any

import grpc
from google.protobuf.message import Message

from pplr.errors import ServerLostError, TransportError
from pplr.runtimes.framing import REFUSED, SERVICE, frames, joined, parsed
from pplr.runtimes.identity import Kit

__all__ = ["StageChannel"]

_RETRIED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_TIDY_S = 2.0
_RESUME = "See that it runs and that its certificate names this address, then try again; `train` goes on with --resume."


def _is_the_servers(error: Any) -> bool:
    """Tell whether the server itself refused, and not gRPC for it."""
    return REFUSED in {key for key, _ in error.trailing_metadata() or ()}


def _is_crowded(error: Any) -> bool:
    """Tell whether gRPC refused for the server, which has too many calls just now."""
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not _is_the_servers(error)


class StageChannel:
    """A connection that several sessions share.

    Args:
        address: ``host:port`` of the stage server.
        kit: A startup kit.
        timeout_s: Deadline of one attempt.
        patience_s: For how long a call is tried again after its first failure, while the server does not answer.
    """

    def __init__(self, address: str, kit: Kit, *, timeout_s: float = 300.0, patience_s: float = 20.0) -> None:
        self.address, self.kit = address, kit
        self._timeout_s, self._patience_s = timeout_s, patience_s
        credentials = grpc.ssl_channel_credentials(kit.ca_pem, kit.key_pem, kit.certificate_pem)
        self._channel = grpc.secure_channel(
            address,
            credentials,
            options=[
                ("grpc.max_receive_message_length", 2 << 20),
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.keepalive_time_ms", 60_000),
            ],
        )
        self._lost = False

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    def call(self, name: str, request: Message, kind: Any, *, max_bytes: int, again: bool = True) -> Any:
        """Send a request, the same again if need be, and read its reply.

        Args:
            name: The method.
            request: Its message. The server must give the same reply to the same request.
            kind: Of the reply.
            max_bytes: Longest reply to take.
            again: Whether to try again while the server does not answer. Without it a call has little time, and after
                one that got no reply it is not even tried: nobody waits for what only tidies up.

        Raises:
            TransportError: The server refused, and did not count the request.
            ServerLostError: It did not answer for ``patience_s``, or knows the session no more.
        """
        if self._lost and not again:
            raise ServerLostError(f"the stage server {self.address} did not answer before", cure=_RESUME)
        content = request.SerializeToString()
        timeout = self._timeout_s if again else min(self._timeout_s, _TIDY_S)
        until, pause, said = None, _FIRST_PAUSE_S, ""
        while True:
            try:
                reply = parsed(kind, self._ask(name, content, timeout, max_bytes))
                self._lost = False
                return reply
            except grpc.RpcError as error:
                code, details = error.code(), " ".join((error.details() or "").split())[:300]
                if code not in _RETRIED and not _is_crowded(error):
                    self._lost = False
                    raise self._refused(name, code, details) from error
                said = f"; it said before: {details}" if _is_the_servers(error) else said
                now = time.monotonic()
                until = now + (self._patience_s if again else 0.0) if until is None else until
                if now + pause > until:
                    self._lost = True
                    raise ServerLostError(
                        f"the stage server {self.address} does not answer ({code.name.lower()}: {details}{said})",
                        cure=_RESUME,
                    ) from error
            time.sleep(pause * random.uniform(0.7, 1.3))  # so that many clients do not come back at once
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _ask(self, name: str, content: bytes, timeout_s: float, max_bytes: int) -> bytes:
        """Send a request once, and leave no call open, whatever ends it."""
        call = self._channel.stream_stream(f"/{SERVICE}/{name}")(frames(content), timeout=timeout_s)
        try:
            return joined(call, max_bytes)
        finally:
            call.cancel()

    def _refused(self, name: str, code: grpc.StatusCode, details: str) -> TransportError:
        if code is grpc.StatusCode.NOT_FOUND:
            return ServerLostError(
                f"the stage server {self.address} does not know this session any more ({details})",
                cure="Go on with --resume; if another process uses the same kit and names, stop one of them.",
            )
        return TransportError(
            f"the stage server refused {name} ({code.name.lower()}): {details}",
            cure="Correct what it names, then go on with --resume.",
        )

    def is_serving(self) -> bool:
        """Ask gRPC's health service, once.

        Raises:
            TransportError: The server does not answer, or refuses this kit.
        """
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        try:
            told = health_pb2_grpc.HealthStub(self._channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE), timeout=min(self._timeout_s, 10.0)
            )
        except grpc.RpcError as error:
            details = " ".join((error.details() or "").split())[:300]
            raise ServerLostError(
                f"the stage server {self.address} does not answer ({error.code().name.lower()}: {details})",
                cure="See that it runs, and that this kit is of its federation and not revoked.",
            ) from error
        return bool(told.status == health_pb2.HealthCheckResponse.SERVING)
