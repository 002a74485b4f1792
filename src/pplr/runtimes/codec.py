"""Hidden states, gradients, adapters and optimizer states as messages, checked before they are believed.

Letters: B rows, T tokens of the longest row, D width, N real tokens of all rows together. Whatever does not fit
raises :class:`~pplr.errors.WireError`, in both directions. Sequences in one row
(:class:`~pplr.backbones.shared_row.SharedRow`) travel as they stand.
"""

from __future__ import annotations

import enum
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pplr.backbones.shared_row import SharedRow
from pplr.errors import WireError
from pplr.runtimes import stage_pb2 as pb

__all__ = [
    "Limits",
    "Wire",
    "decode_sees",
    "decode_states",
    "decode_tensors",
    "encode_sees",
    "encode_states",
    "encode_tensors",
    "left_mask",
    "lengths_of_left_mask",
    "positions_of",
    "relative_error",
    "row_of",
]

_MAX_ROWS, _MAX_TOKENS = 512, 8192
_MAX_TENSORS, _MAX_NAME, _MAX_DIMENSIONS = 1 << 14, 512, 8
_LEVELS = 127
_SAME = "Use the same version and the same cut on both sides."
_SMALLER = "Send less at once, or raise the limit of the side that refuses."
_DIVERGED = "Look for a training that diverges: lower training.learning_rate."
_TYPES = "Send float32 or bfloat16; int64 for a single number."
_DTYPES: dict[int, torch.dtype] = {
    pb.DTYPE_FLOAT32: torch.float32,
    pb.DTYPE_BFLOAT16: torch.bfloat16,
    pb.DTYPE_INT64: torch.int64,
}


class Wire(enum.Enum):
    """How hidden states and gradients travel."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @property
    def number(self) -> pb.Wire:
        """What stands for it in a message."""
        return _NUMBERS[self]

    @classmethod
    def of(cls, number: int) -> Wire:
        """Name what a number in a message stands for."""
        found = [wire for wire, known in _NUMBERS.items() if known == number]
        _check(bool(found), f"states in an unknown form, number {number}", _SAME)
        return found[0]


_NUMBERS = {Wire.FLOAT32: pb.WIRE_FLOAT32, Wire.BFLOAT16: pb.WIRE_BFLOAT16, Wire.INT8: pb.WIRE_INT8}
_SENT_AS = {Wire.FLOAT32: torch.float32, Wire.BFLOAT16: torch.bfloat16, Wire.INT8: torch.int8}


@dataclass(frozen=True)
class Limits:
    """What one message of states may hold.

    Args:
        width: D, exactly.
        max_rows: Largest B.
        max_tokens: Largest T.
        max_message_bytes: Most bytes sent; bounds B · T · D too, so that padding cannot be a bomb.
        max_norm: Largest L2 norm of one token's vector.
    """

    width: int
    max_rows: int = _MAX_ROWS
    max_tokens: int = _MAX_TOKENS
    max_message_bytes: int = 64 << 20
    max_norm: float = 1e5


def encode_states(
    states: Tensor, lengths: Tensor, wire: Wire, *, padded_left: bool = False, row: SharedRow | None = None
) -> pb.States:
    """Write the vectors of real tokens, row after row; padding does not travel.

    int8 keeps round(x / s) and s = max|x| / 127 of each token, so x is off by at most about s / 2.

    Args:
        states: (B, T, D), float32, bfloat16 or float16.
        lengths: (B,), real tokens of each row, at least 1, or 0 where padding is on the left; the longest row has T.
        wire: How to send them. Only float32 keeps every bit, and bfloat16 those of bfloat16.
        padded_left: Whether padding is on the left.
        row: How sequences stand in the one row of states (1, N, D), whose length is N.
    """
    shape, kind = tuple(states.shape), states.dtype
    floats = kind in (torch.float32, torch.bfloat16, torch.float16)
    _check(len(shape) == 3 and 0 not in shape and floats, f"states {shape} of {kind} to send", "Send floats (B, T, D).")
    _check(lengths.dim() == 1 and not lengths.is_floating_point(), "lengths that are no row of integers", _SAME)
    counts = [int(length) for length in lengths.tolist()]
    _check_lengths(counts, shape[0], shape[1], empty=padded_left)
    vectors = states.detach()[_real(counts, shape[1], padded_left).to(states.device)]  # (B, T, D) -> (N, D)
    scales = b""
    if wire is Wire.INT8:
        vectors = vectors.float()
        step = vectors.abs().amax(dim=1, keepdim=True) / _LEVELS  # (N, 1)
        _check(bool(torch.isfinite(step).all()), "states to send that are not finite", _DIVERGED)
        vectors = torch.where(step > 0, vectors / step, 0.0).round().clamp(-_LEVELS, _LEVELS)
        scales = _raw(step)
    vectors = vectors.to(_SENT_AS[wire])
    _check(bool(torch.isfinite(vectors).all()), "states to send that are not finite", _DIVERGED)
    message = pb.States(rows=shape[0], tokens=shape[1], width=shape[2], wire=wire.number, padded_left=padded_left)
    if row is not None:
        fits = shape[:2] == (1, row.tokens) and min(row.lengths) >= 1 and not padded_left
        _check(fits, f"states {shape} of a row of {row.tokens} tokens", _SAME)
        message.rows, message.tokens, message.prefix = len(row.lengths), max(row.lengths), row.prefix
    message.lengths.extend(counts if row is None else row.lengths)
    message.data, message.scales = _raw(vectors), scales
    return message


def decode_states(
    message: pb.States, limits: Limits, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Read what :func:`encode_states` wrote; nothing is allocated before the message is known to fit.

    Args:
        message: Its sender is not trusted.
        limits: What it may hold.
        dtype: Of the states to return.
        device: Where to put the states; lengths stay on the CPU.

    Returns:
        The states (B, T, D), 0 where there is padding, and the lengths (B,). Where sequences stand in one row, that row
        (1, N, D), whose layout :func:`row_of` tells, and its length.

    Raises:
        WireError: It is malformed, over a limit, or not finite.
    """
    rows, tokens, width = message.rows, message.tokens, message.width
    _check(width == limits.width, f"states {width} wide, expected {limits.width}", _SAME)
    in_row, longest = message.HasField("prefix"), message.prefix + tokens
    _check(not (in_row and message.padded_left), "sequences in one row that are padded", _SAME)
    _check(tokens >= 1, "states of no token", _SAME)
    _check_extent(rows, longest, limits.max_rows, limits.max_tokens)
    padded = rows * longest * width
    _check(padded <= limits.max_message_bytes, f"{padded} numbers with padding, over the limit", _SMALLER)
    _check(len(message.lengths) == rows, f"{len(message.lengths)} lengths for {rows} rows", _SAME)
    counts = list(message.lengths)
    _check_lengths(counts, rows, tokens, empty=message.padded_left)
    wire, total = Wire.of(message.wire), message.prefix + sum(counts)
    data, scales = message.data, message.scales
    _check(len(data) + len(scales) <= limits.max_message_bytes, "states of more bytes than the limit", _SMALLER)
    _check_size(len(data), total * width * _SENT_AS[wire].itemsize, "states")
    _check_size(len(scales), total * 4 if wire is Wire.INT8 else 0, "scales")
    _check(dtype.is_floating_point, f"states asked for as {dtype}", "Ask for a floating point type.")
    try:
        vectors = _tensor(data, _SENT_AS[wire]).view(total, width)
        if wire is Wire.INT8:
            step = _tensor(scales, torch.float32).view(total, 1)
            fine = (step >= 0) & torch.isfinite(step)
            _check(bool(fine.all()), "scales that are negative or not finite", _DIVERGED)
            vectors = vectors.float().mul_(step)
        vectors = vectors.to(dtype)
        _check_norms(vectors, limits.max_norm, "states")
        vectors = vectors.to(device)
        if in_row:
            return vectors.view(1, total, width), torch.tensor([total])
        if total == rows * tokens:
            states = vectors.view(rows, tokens, width)
        else:
            states = torch.zeros(rows, tokens, width, dtype=dtype, device=device)
            states[_real(counts, tokens, message.padded_left).to(device)] = vectors
    except (MemoryError, RuntimeError) as error:
        raise WireError(f"{padded} numbers could not be put on {device}", cure=_SMALLER) from error
    return states, torch.tensor(counts)


def row_of(message: pb.States) -> SharedRow | None:
    """Tell how sequences stand in the row that a message holds, which :func:`decode_states` took; ``None`` if apart."""
    return SharedRow(message.prefix, tuple(message.lengths)) if message.HasField("prefix") else None


def encode_tensors(tensors: Mapping[str, Tensor]) -> pb.Tensors:
    """Write named tensors: float32 or bfloat16 of any shape without a 0, and int64 of one element."""
    message = pb.Tensors()
    for name, tensor in tensors.items():
        number = next((number for number, dtype in _DTYPES.items() if dtype == tensor.dtype), 0)
        _check_form(name, number, tensor.shape, "tensors to send")
        message.tensors.add(name=name, dtype=pb.DType.Name(number), shape=tensor.shape, data=_raw(tensor.detach()))
    return message


def decode_tensors(
    message: pb.Tensors,
    expected: Mapping[str, tuple[int, ...]] | None,
    *,
    whose: str,
    max_bytes: int,
    max_norm: float | None,
) -> dict[str, Tensor]:
    """Read what :func:`encode_tensors` wrote; nothing is allocated before all of it is known to fit.

    Args:
        message: Its sender is not trusted.
        expected: The shape of every tensor by name; ``None`` takes any names and shapes.
        whose: What the tensors are, for the error.
        max_bytes: Most bytes of all tensors together.
        max_norm: Largest L2 norm of one tensor of floats; ``None`` asks only that it is finite.

    Raises:
        WireError: A tensor is missing, unknown, named twice, malformed, too large, or not finite.
    """
    found, wanted = len(message.tensors), range(_MAX_TENSORS + 1) if expected is None else (len(expected),)
    _check(found in wanted, f"{whose}: {found} tensors, expected {wanted[-1]} and no more", _SAME)
    contents: dict[str, tuple[torch.dtype, tuple[int, ...], bytes]] = {}
    left = max_bytes
    for entry in message.tensors:
        name, data = entry.name, entry.data
        size = _check_form(name, entry.dtype, entry.shape, whose)
        shape = tuple(entry.shape)
        _check(name not in contents, f"{whose}: {name!r} is there twice", _SAME)
        right = shape if expected is None else expected.get(name, "no such tensor")
        _check(shape == right, f"{whose}: {name!r} has shape {shape}, expected {right}", _SAME)
        _check_size(len(data), size, f"{whose}: {name!r}")
        left -= size
        _check(left >= 0, f"{whose}: more than {max_bytes} bytes", _SMALLER)
        contents[name] = _DTYPES[entry.dtype], shape, data
    tensors: dict[str, Tensor] = {}
    try:
        for name, (dtype, shape, data) in contents.items():
            tensors[name] = _tensor(data, dtype).view(shape)
            if dtype.is_floating_point:
                _check_norms(tensors[name].view(1, -1), max_norm, f"{whose}: {name!r}")
    except (MemoryError, RuntimeError) as error:
        raise WireError(f"{whose}: no room for {max_bytes - left} bytes", cure=_SMALLER) from error
    return tensors


def left_mask(
    total_tokens: int, total_lengths: Sequence[int], *, max_rows: int = _MAX_ROWS, max_tokens: int = _MAX_TOKENS
) -> Tensor:
    """Build the attention mask (B, T) of rows that are padded on the left.

    Example:
        >>> mask = left_mask(3, [1, 3])
        >>> mask.tolist(), lengths_of_left_mask(mask).tolist(), positions_of(mask, 2).tolist()
        ([[0, 0, 1], [1, 1, 1]], [1, 3], [[0, 0], [1, 2]])
    """
    _check_extent(len(total_lengths), total_tokens, max_rows, max_tokens)
    _check_lengths(total_lengths, len(total_lengths), total_tokens, full=False, empty=True)
    return _real(list(total_lengths), total_tokens, padded_left=True).long()


def lengths_of_left_mask(mask: Tensor) -> Tensor:
    """Count the real tokens (B,) of each row of an attention mask (B, T), each 0 for padding and then 1."""
    _check(mask.dim() == 2 and mask.numel() > 0, f"a mask of shape {tuple(mask.shape)}", "Give a mask (B, T).")
    real = mask == 1
    grows = (real[:, 1:] | ~real[:, :-1]).all() & (real | (mask == 0)).all()
    _check(bool(grows), "a mask with a row that is not 0 for padding and then 1", "Pad on the left only.")
    return real.sum(dim=1)


def encode_sees(mask: Tensor) -> bytes:
    """Write which tokens each new token sees: (B, T_new, T) booleans, a bit each, the last byte filled up by zeros."""
    return np.packbits(mask.cpu().numpy()).tobytes()


def decode_sees(content: bytes, rows: int, tokens: int, total_tokens: int) -> Tensor:
    """Read what :func:`encode_sees` wrote: (rows, tokens, total_tokens).

    Every new token must see itself, so that none is left without anything to attend to.

    Example:
        >>> mask = torch.tensor([[[True, True, False], [True, False, True]]])
        >>> bool((decode_sees(encode_sees(mask), 1, 2, 3) == mask).all())
        True
    """
    bits = rows * tokens * total_tokens
    _check(0 < tokens <= total_tokens and rows > 0, f"a mask for {tokens} of {total_tokens} tokens", _SAME)
    _check_size(len(content), -(-bits // 8), "a mask")
    mask = torch.from_numpy(np.unpackbits(np.frombuffer(content, np.uint8), count=bits)).bool()
    mask = mask.view(rows, tokens, total_tokens)
    itself = mask[:, :, -tokens:].diagonal(dim1=1, dim2=2)
    _check(bool(itself.all()), "a mask by which a token does not see itself", _SAME)
    return mask


def positions_of(mask: Tensor, tokens: int) -> Tensor:
    """Number the last tokens (B, tokens) of a mask (B, T), from 0 at each row's first real token."""
    shape = tuple(mask.shape)
    _check(len(shape) == 2 and 1 <= tokens <= shape[1], f"{tokens} positions under a mask {shape}", _SAME)
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def relative_error(states: Tensor, lengths: Tensor, wire: Wire) -> float:
    """Measure what sending loses: ‖x - decode(encode(x))‖ / ‖x‖ over real tokens, padded on the right."""
    message = encode_states(states, lengths, wire)
    limits = Limits(message.width, message.rows, message.tokens, sys.maxsize, math.inf)
    came, counts = decode_states(message, limits, dtype=torch.float32, device="cpu")
    real = _real(counts.tolist(), message.tokens, padded_left=False)
    sent = states.detach().cpu()[real].double()
    norm = float(sent.norm())
    return float((sent - came[real].double()).norm()) / norm if norm else 0.0


def _real(counts: Sequence[int], tokens: int, padded_left: bool) -> Tensor:
    """Mark real tokens: (B, T), boolean."""
    position, lengths = torch.arange(tokens), torch.tensor(counts)[:, None]
    return position >= tokens - lengths if padded_left else position < lengths


def _raw(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """Copy bytes to where torch puts its own tensors: products of others may differ in their last bit."""
    copied = torch.empty(len(data), dtype=torch.uint8)
    copied.numpy()[:] = np.frombuffer(data, dtype=np.uint8)
    return copied.view(dtype)


def _check(fine: bool, message: str, cure: str) -> None:
    if not fine:
        raise WireError(message, cure=cure)


def _check_extent(rows: int, tokens: int, max_rows: int, max_tokens: int) -> None:
    fine = 1 <= rows <= max_rows and 1 <= tokens <= max_tokens
    _check(fine, f"{rows} rows of {tokens} tokens, at most {max_rows} of {max_tokens} are allowed", _SMALLER)


def _check_lengths(counts: Sequence[int], rows: int, tokens: int, *, full: bool = True, empty: bool = False) -> None:
    """Check real tokens of each row; a row that is only padding so far can come in front of a generation."""
    least = 0 if empty else 1
    fine = len(counts) == rows and all(least <= count <= tokens for count in counts)
    _check(fine, f"lengths that do not fit {rows} rows of {least} to {tokens} tokens", _SAME)
    _check(not full or max(counts) == tokens, f"no row has all of {tokens} tokens", "Pad to the longest row only.")


def _check_size(seen: int, expected: int, what: str) -> None:
    _check(seen == expected, f"{what}: {seen} bytes, expected {expected}", _SAME)


def _check_form(name: str, number: int, shape: Sequence[int], whose: str) -> int:
    """Check what is said of a named tensor and return its bytes."""
    fine = 1 <= len(name) <= _MAX_NAME and name.isprintable()
    _check(fine, f"{whose}: a name of {len(name)} letters that cannot be sent", "Use 1 to 512 printable letters.")
    _check(number in _DTYPES, f"{whose}: {name!r} has a type that cannot be sent", _TYPES)
    fine = len(shape) <= _MAX_DIMENSIONS and all(size >= 1 for size in shape)
    _check(fine, f"{whose}: {name!r} is empty or has too many dimensions", "Send tensors of 1 to 8 dimensions.")
    elements = math.prod(shape)
    _check(elements == 1 or _DTYPES[number] != torch.int64, f"{whose}: {name!r} holds {elements} integers", _TYPES)
    return elements * _DTYPES[number].itemsize


def _check_norms(vectors: Tensor, most: float | None, what: str) -> None:
    """Check vectors (N, D) in one pass: a norm in float64 is finite just if its vector is."""
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    _check(bool(torch.isfinite(norms).all()), f"{what}: numbers that are not finite", _DIVERGED)
    _check(most is None or bool((norms <= most).all()), f"{what}: a norm above {most}", _DIVERGED)
