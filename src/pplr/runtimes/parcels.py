"""Orders to a client and its reports, each one safetensors blob: tensors in their own dtype, all else in its header.

Safetensors is a plain header of names, dtypes, shapes and places, then the tensors' bytes: nothing in it is executed,
and its reader refuses a header that does not fit the bytes before it allocates anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pplr.errors import WireError

__all__ = ["HELLO", "MAX_BYTES", "TEST", "TRAIN", "VALIDATE", "Parcel"]

HELLO, TRAIN, VALIDATE, TEST = "hello", "train", "validate", "test"
"""Kinds of orders, and of the reports on them."""

MAX_BYTES = 1 << 31
"""Largest parcel that is read, unless told otherwise."""
_MAX_HEADER = 16 << 20
_PREFIX = 8  # bytes that tell the header's length
_KIND, _TOLD = "kind", "told"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
_SAME = "Use the same version of pplr on both sides."


@dataclass(frozen=True)
class Parcel:
    """One order or one report.

    Args:
        kind: What it asks or answers.
        told: What JSON can hold, without NaN and infinities.
        tensors: An adapter, or a part of one.
    """

    kind: str
    told: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Write it as bytes."""
        told = json.dumps(self.told, allow_nan=False, ensure_ascii=False)
        tensors = {name: own.detach().cpu().contiguous() for name, own in self.tensors.items()}
        return save(tensors, metadata={_KIND: self.kind, _TOLD: told})

    @classmethod
    def unpack(cls, data: bytes, *, whose: str, max_bytes: int = MAX_BYTES) -> Parcel:
        """Read what :meth:`pack` wrote, and believe nothing else.

        Args:
            data: The bytes.
            whose: Who sent them, for messages.
            max_bytes: More are refused unread.

        Raises:
            WireError: It is too large, or no parcel.
        """
        if len(data) > max_bytes:
            raise WireError(f"{whose} sent {len(data):,} bytes, more than {max_bytes:,}", cure="Send less at once.")
        metadata = _metadata(data, whose)
        try:
            kind, told = metadata[_KIND], json.loads(metadata[_TOLD], parse_constant=_refuse)
            tensors = load(data)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise WireError(f"{whose} sent what is no parcel ({type(error).__name__}: {error})", cure=_SAME) from error
        if not isinstance(told, dict) or not isinstance(kind, str):
            raise WireError(f"{whose} sent a parcel that tells no fields", cure=_SAME)
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise WireError(f"{whose} sent {name} as {tensor.dtype}, which no adapter is", cure=_SAME)
        return cls(kind, told, tensors)


def _metadata(data: bytes, whose: str) -> dict[str, Any]:
    """Read the header's own fields, which safetensors' reader of bytes passes over."""
    size = int.from_bytes(data[:_PREFIX], "little")
    if len(data) < _PREFIX or size > min(_MAX_HEADER, len(data) - _PREFIX):
        raise WireError(f"{whose} sent {len(data):,} bytes with a header of {size:,}", cure=_SAME)
    try:
        header = json.loads(data[_PREFIX : _PREFIX + size], parse_constant=_refuse)
        return dict(header["__metadata__"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WireError(f"{whose} sent a header that cannot be read ({type(error).__name__})", cure=_SAME) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
