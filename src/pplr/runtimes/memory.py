"""How much memory this process took, and how it takes less."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["hand_back_large_blocks", "keep_few_kernels", "peak_rss_bytes", "rss_bytes"]

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h
_LARGE = 1 << 18
_KERNELS = 128
"""Products of different shapes that stay compiled."""


def rss_bytes() -> int | None:
    """Resident memory of this process now; ``None`` where the system does not tell."""
    return _status("VmRSS")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; ``None`` where the system does not tell."""
    return _status("VmHWM")


def hand_back_large_blocks() -> bool:
    """Let the C library give memory from 256 KiB upwards back to the system as soon as it is freed.

    Otherwise glibc raises that threshold to 32 MiB as a process goes on, and keeps what a training step has freed in
    pieces that the next step may not fit in. What is smaller comes from one heap for all threads, so that what gRPC's
    threads have freed is used again. ``python -m benchmarks.network_memory`` says what that leaves.

    Returns:
        Whether the C library is glibc and took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_ARENA_MAX, 1))
    except (OSError, AttributeError):
        return False


def keep_few_kernels() -> None:
    """Let oneDNN and torch keep the compiled products of the newest shapes only, before either has multiplied anything.

    On a CPU each shape of a bfloat16 product is compiled, some hundred KiB that lie in the heap between what training
    frees. Where hardly two batches are of one shape, the 1,024 that are kept otherwise come together within a round,
    are of no use, and what they pin down is several times their size. Where shapes come again it would cost time,
    since each takes milliseconds to compile. ``ONEDNN_PRIMITIVE_CACHE_CAPACITY`` and ``LRU_CACHE_CAPACITY`` say
    otherwise where they are set.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
    except (OSError, StopIteration, ValueError):
        return None
