"""A message as frames below gRPC's message limit: its length first, then its bytes in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import DecodeError

from pplr.errors import WireError

__all__ = ["FRAME_BYTES", "PROTOCOL", "REFUSED", "SERVICE", "frames", "joined", "parsed"]

SERVICE = "pplr.Stage"
"""The gRPC service; each call is a stream of frames each way."""

PROTOCOL = "4"
"""What both sides must speak alike."""

FRAME_BYTES = 1 << 20
"""Largest frame."""

REFUSED = "pplr-refused"
"""Trailing metadata of what the stage server itself refused; what gRPC refuses for it has none, and may pass."""

_LENGTH = struct.Struct("<Q")
_PARTS = 1 << 17
_FIXED = {1: 8, 5: 4}  # bytes of a number by its form
_SAME = "Use the client of this version."


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
            raise WireError("a message that is longer than it says", cure=_SAME)
    if expected is None or len(kept) != expected:
        raise WireError("a message that ended early", cure="Send it again.")
    return bytes(kept[_LENGTH.size :])


def parsed(kind: Any, content: bytes) -> Any:
    """Read a protobuf message, its parts counted first: an empty part is two bytes to send, and eighty in memory.

    Args:
        kind: The message's class.
        content: Its sender is not trusted.

    Raises:
        WireError: It is malformed, or has more parts than any message of pplr.
    """
    left = _PARTS
    within = [(0, len(content), kind.DESCRIPTOR)]
    try:
        while within:
            at, end, told = within.pop()
            while at < end:
                tag, at = _varint(content, at)
                form, field = tag & 7, told.fields_by_number.get(tag >> 3)
                size = _FIXED.get(form, 0)
                if form == 0:
                    _, at = _varint(content, at)
                elif form == 2:
                    size, at = _varint(content, at)
                    if field is not None and field.message_type is not None:
                        within.append((at, at + size, field.message_type))
                    elif field is not None and field.is_repeated:
                        left -= size  # packed numbers of a byte each
                elif form not in _FIXED:
                    raise DecodeError
                at += size
                left -= 1
                if left < 0:
                    raise WireError(f"a message of more than {_PARTS} parts", cure=_SAME)
        return kind.FromString(content)
    except (DecodeError, IndexError) as error:
        raise WireError("a message that cannot be read", cure=_SAME) from error


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, and where it ends."""
    value = content[at] & 0x7F
    shift = 0
    while content[at] & 0x80:
        at, shift = at + 1, shift + 7
        if shift > 63:
            raise DecodeError
        value |= (content[at] & 0x7F) << shift
    return value, at + 1
