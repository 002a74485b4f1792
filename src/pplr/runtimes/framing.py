"""A message as frames below gRPC's message limit: its length first, then its bytes in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from pplr.errors import WireError

__all__ = ["FRAME_BYTES", "PROTOCOL", "SERVICE", "frames", "joined"]

SERVICE = "pplr.Stage"
"""The gRPC service; each call is a stream of frames each way."""

PROTOCOL = "1"
"""What both sides must speak alike."""

FRAME_BYTES = 1 << 20
"""Largest frame."""

_LENGTH = struct.Struct("<Q")


def frames(content: bytes) -> Iterator[bytes]:
    """Divide a message.

    Example:
        >>> [len(frame) for frame in frames(b"x" * (FRAME_BYTES + 1))]
        [1048576, 9]
    """
    whole = memoryview(_LENGTH.pack(len(content)) + content)
    for start in range(0, len(whole), FRAME_BYTES):
        yield bytes(whole[start : start + FRAME_BYTES])


def joined(parts: Iterable[bytes], max_bytes: int) -> bytes:
    """Put a message together again.

    Args:
        parts: Its frames.
        max_bytes: Longest message; a longer one is refused by the length it declares, before its bytes are kept.

    Raises:
        WireError: It is longer than allowed, or longer or shorter than it says.
    """
    kept = bytearray()
    expected: int | None = None
    for part in parts:
        kept += part
        if expected is None and len(kept) >= _LENGTH.size:
            expected = _LENGTH.unpack_from(kept)[0] + _LENGTH.size
            if expected > max_bytes + _LENGTH.size:
                raise WireError(
                    f"a message of {expected - _LENGTH.size} bytes, at most {max_bytes} are allowed",
                    cure="Send smaller batches, or raise the server's limit.",
                )
        if len(kept) > (_LENGTH.size if expected is None else expected):
            raise WireError("a message that is longer than it says", cure="Use the client of this version.")
    if expected is None or len(kept) != expected:
        raise WireError("a message that ended early", cure="Send it again.")
    return bytes(kept[_LENGTH.size :])
