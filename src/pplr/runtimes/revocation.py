"""The certificates that count no more: a file that is read again whenever it changes."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Final

from pplr.errors import IdentityError

__all__ = ["EMPTY_LIST", "RevocationList"]

EMPTY_LIST: Final = "# revoked certificates of this federation: a serial in hex on each line\n"
_LINE: Final = re.compile(r"\s*([0-9a-fA-F]{1,40})?\s*(#.*)?")


class RevocationList:
    """The serials that count no more, read again whenever the file changed, so that no restart is needed.

    Raises:
        IdentityError: The file is missing, truncated or malformed, now or at any later question: nobody is let in then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._serials: frozenset[int] = frozenset()
        self.is_revoked(0)

    def is_revoked(self, serial: int) -> bool:
        """Say whether a certificate's serial is on the list as it is on the disk now."""
        try:
            with self._lock:
                if _stamp(os.stat(self.path)) != self._stamp:  # noqa: PTH116
                    with self.path.open("rb") as file:
                        stamp = _stamp(os.fstat(file.fileno()))
                        self._serials = _parse_revoked(file.read().decode())
                    self._stamp = stamp
                return serial in self._serials
        except (OSError, ValueError) as error:
            raise IdentityError(
                f"the revocation list {self.path} cannot be used: {error}; nobody is let in without it",
                cure="Put back the list of the federation's folder: whole lines, on each a serial in hex.",
            ) from error


def _parse_revoked(text: str) -> frozenset[int]:
    """Read the list; a file that is empty, or whose last line has no end, was truncated."""
    if not text.endswith("\n"):
        raise ValueError("its end is missing")
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (parts := _LINE.fullmatch(line)):
            raise ValueError(f"line {number} is not a serial in hex")
        if parts[1]:
            found.add(int(parts[1], 16))
    return frozenset(found)


def _stamp(seen: os.stat_result) -> tuple[int, ...]:
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino
