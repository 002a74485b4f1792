"""What the stage server counts, as Prometheus reads it. Names and numbers only: nothing of a tensor."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.exposition import generate_latest

from pplr.errors import TransportError

__all__ = ["StageMetrics"]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class StageMetrics:
    """Requests, latencies, bytes, sessions and memory of one stage server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "pplr", "subsystem": "stage", "registry": self._registry}
        self._requests = Counter("requests", "Requests answered or refused.", ["client", "method", "code"], **shared)
        self._seconds = Histogram(
            "request_seconds", "From a request's last byte to its answer.", ["method"], buckets=_SECONDS, **shared
        )
        self._wait = Histogram("wait_seconds", "Waiting for a turn to compute.", ["method"], buckets=_SECONDS, **shared)
        self._together = Histogram(
            "pass_clients", "Clients in a training pass that may have several.", buckets=(1, 2, 4, 8, 16, 32), **shared
        )
        self._bytes = Counter("bytes", "Bytes of messages.", ["client", "direction"], **shared)
        self._shared = shared
        ProcessCollector(registry=self._registry)

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Show a number that is read whenever somebody asks."""
        Gauge(name, meaning, **self._shared).set_function(read)

    def request(self, client: str, method: str, code: str) -> None:
        """Count a request; a caller without a certificate that counts has no name."""
        self._requests.labels(client, method, code).inc()

    def took(self, method: str, seconds: float) -> None:
        """Count how long an answer took."""
        self._seconds.labels(method).observe(seconds)

    def waited(self, method: str, seconds: float) -> None:
        """Count how long a call waited for its turn."""
        self._wait.labels(method).observe(seconds)

    def together(self, clients: int) -> None:
        """Count a training pass that could have several clients."""
        self._together.observe(clients)

    def crossed(self, client: str, *, received: int = 0, sent: int = 0) -> None:
        """Count bytes."""
        self._bytes.labels(client, "received").inc(received)
        self._bytes.labels(client, "sent").inc(sent)

    def text(self) -> str:
        """Write everything in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def listen(self, address: str) -> tuple[int, Callable[[], None]]:
        """Answer Prometheus over plain HTTP, on this machine only.

        Args:
            address: ``HOST:PORT`` with a loopback host; port 0 takes a free one.

        Returns:
            The port, and what stops it.

        Raises:
            TransportError: The address is not of this machine alone, or not free.
        """
        host, _, port = address.rpartition(":")
        if not _is_loopback(host) or not port.isdigit():
            raise TransportError(
                f"metrics at {address!r}: they are plain text and name clients, so only a loopback address is taken",
                cure="Use 127.0.0.1:PORT and let a collector on this machine read it, or `pplr stage metrics`.",
            )
        try:
            server, thread = start_http_server(int(port), addr=host, registry=self._registry)
        except (OSError, OverflowError) as error:
            raise TransportError(f"cannot listen on {address}: {error}", cure="Choose a free port.") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return int(server.server_port), stop


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
