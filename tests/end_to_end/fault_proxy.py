"""A network that fails: it carries bytes between a client and a server on loopback, and cuts when it is told to."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from contextlib import suppress

_AT_ONCE = struct.pack("ii", 1, 0)  # close by reset, and let go of what was not sent


class Proxy:
    """Carries connections to ``localhost:port``.

    Args:
        port: The server's.
        cuts: Moments to cut, in their order: ``("up", n)`` after ``n`` more bytes from the client, of which the last
            part arrives; ``("down", n)`` after ``n`` more bytes from the server, of which the last part does not
            arrive; ``("refuse", n)`` cuts the next ``n`` connections as soon as they are there.

    Attributes:
        port: Where to connect instead.
        connections: How many there were.
        cut_count: How many of them were cut.
    """

    def __init__(self, port: int, cuts: tuple[tuple[str, int], ...] = ()) -> None:
        self._server = ("localhost", port)
        self._cuts = list(cuts)
        self._left = self._cuts[0][1] if self._cuts else 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = self.cut_count = 0
        self._peers: dict[socket.socket, tuple[socket.socket, str]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._told, self._ear = socket.socketpair()
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._done = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Cut every connection now; they are cut when this returns."""
        self._told.send(b"c")
        assert self._done.acquire(timeout=10)

    def close(self) -> None:
        """Cut every connection and take no more."""
        if self._thread.is_alive():
            self._told.send(b"x")
            self._thread.join(10)
        for own in (self._listener, self._told, self._ear):
            own.close()
        self._selector.close()

    @property
    def planned(self) -> int:
        """Cuts that are still to come."""
        return len(self._cuts)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                own = key.fileobj
                assert isinstance(own, socket.socket)
                if own is self._ear:
                    asked = own.recv(1)
                    self._cut_all()
                    if asked == b"x":
                        return
                    self._done.release()
                elif own is self._listener:
                    self._accept()
                elif own in self._peers:  # it may have been cut a moment ago
                    self._carry(own)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        self.connections += 1
        if self._cuts and self._cuts[0][0] == "refuse":
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            near.close()
            self.cut_count += 1
            self._passed(1)
            return
        try:
            far = socket.create_connection(self._server, timeout=10)
        except OSError:  # the server is not there
            near.close()
            return
        for one, other, way in ((near, far, "up"), (far, near, "down")):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[one] = other, way
            self._selector.register(one, selectors.EVENT_READ)

    def _carry(self, own: socket.socket) -> None:
        other, way = self._peers[own]
        try:
            content = own.recv(1 << 16)
        except OSError:
            content = b""
        if not content:
            self._close(own, other)
            return
        cuts = bool(self._cuts) and self._cuts[0][0] == way and len(content) >= self._left
        if cuts and way == "up":
            content = content[: self._left]
        if not (cuts and way == "down"):
            with suppress(OSError):
                other.sendall(content)
        if cuts:
            self._passed(self._left)
            self._cut_all()
        elif self._cuts and self._cuts[0][0] == way:
            self._passed(len(content))

    def _passed(self, amount: int) -> None:
        """Count towards the next cut."""
        self._left -= amount
        if self._left <= 0:
            self._cuts.pop(0)
            self._left = self._cuts[0][1] if self._cuts else 0

    def _cut_all(self) -> None:
        for own, (other, way) in list(self._peers.items()):
            if way == "up":
                for end in (own, other):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                self._close(own, other)
                self.cut_count += 1

    def _close(self, *ends: socket.socket) -> None:
        for own in ends:
            if self._peers.pop(own, None) is not None:
                self._selector.unregister(own)
            own.close()
