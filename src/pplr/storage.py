"""Files that are whole or absent: temporary file, fsync, rename; SHA-256 for what is read back."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pplr.errors import StorageError

__all__ = ["cache_dir", "sha256_bytes", "sha256_file", "storage_errors", "write_atomic", "write_json"]


def cache_dir() -> Path:
    """Return the folder for what can be fetched or computed again.

    ``$PPLR_CACHE``, else ``$XDG_CACHE_HOME/pplr``, else ``~/.cache/pplr``. It may not exist yet.
    """
    if explicit := os.environ.get("PPLR_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pplr"


def sha256_bytes(content: bytes) -> str:
    """Hash bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash a file without reading it whole into memory, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into a :class:`~pplr.errors.StorageError` that names the path and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left while writing {path}; what was there before is untouched",
                cure="Free some space, then go on with --resume or the same command.",
            ) from error
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", cure="Choose a folder that can be written."
        ) from error


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, never a part, even after a crash.

    Until it is in place, only its owner can read it.

    Args:
        path: Where; folders above it are made.
        content: The bytes.
        mode: Permissions of the finished file.

    Raises:
        StorageError: The disk is full or refuses; the file that was there before is untouched.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)  # noqa: PTH101
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinities are refused rather than written as what JSON does not know."""
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
