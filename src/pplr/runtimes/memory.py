"""How much memory this process took."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

__all__ = ["hand_back_large_blocks", "peak_rss_bytes", "rss_bytes"]

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


def rss_bytes() -> int | None:
    """Resident memory of this process now; ``None`` where the system does not tell."""
    return _status("VmRSS")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; ``None`` where the system does not tell."""
    return _status("VmHWM")


def hand_back_large_blocks() -> bool:
    """Let the C library give memory from 1 MiB upwards back to the system as soon as it is freed.

    Otherwise glibc raises that threshold to 32 MiB as a process goes on, and keeps what a training step has freed in
    pieces that the next step may not fit in. ``python -m benchmarks.network_memory`` says what that costs.

    Returns:
        Whether the C library is glibc and took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (OSError, AttributeError):
        return False


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
    except (OSError, StopIteration, ValueError):
        return None
