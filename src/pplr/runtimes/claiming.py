"""The lock on a run folder while a process writes it."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO, Any

__all__ = ["LOCK", "claim", "is_claimed"]

LOCK = ".lock"
"""The file in a run folder that is locked."""
_TRIES, _BETWEEN_S = 5, 0.02
"""How often, and how far apart, a lock is asked for: whoever looks whether it is taken holds it for a moment."""


def claim(lock: IO[Any]) -> bool:
    """Take the lock, which goes with the process at the latest, and say whether it was free."""
    for _ in range(_TRIES):
        if _locked(lock, fcntl.LOCK_EX):
            return True
        time.sleep(_BETWEEN_S)
    return False


def is_claimed(folder: Path) -> bool:
    """Say whether a process is writing a run folder just now; where there is no telling, no."""
    try:
        with (folder / LOCK).open("rb") as lock:
            return not _locked(lock, fcntl.LOCK_SH)
    except OSError:
        return False


def _locked(lock: IO[Any], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
