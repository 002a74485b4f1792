"""How much memory this process took."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_rss_bytes", "rss_bytes"]


def rss_bytes() -> int | None:
    """Resident memory of this process now; ``None`` where the system does not tell."""
    return _status("VmRSS")


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; ``None`` where the system does not tell."""
    return _status("VmHWM")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
    except (OSError, StopIteration, ValueError):
        return None
