"""The secret of a client, from which its randomness follows: 32 bytes that are nobody else's."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from pplr.errors import RunError
from pplr.storage import write_atomic

__all__ = ["client_secret", "derived", "new_secret", "secret_path"]

_KEY_BYTES = 32


def new_secret() -> bytes:
    """Draw a secret from the operating system."""
    return os.urandom(_KEY_BYTES)


def secret_path(folder: Path, client: str) -> Path:
    """Say where a client keeps its secret."""
    return folder / f"{client}.key"


def client_secret(folder: Path, client: str) -> bytes:
    """Read a client's secret, or draw one where there is none yet.

    Args:
        folder: Where the client keeps it; made when absent.
        client: Its name.

    Raises:
        RunError: The secret is damaged or open to others.
    """
    path = secret_path(folder, client)
    if not path.exists():
        write_atomic(path, new_secret(), mode=0o600)
    secret = path.read_bytes()
    if path.stat().st_mode & 0o077:
        raise RunError(f"{path} can be read by others than its owner", cure=f"Run chmod 600 {path}.")
    if len(secret) != _KEY_BYTES:
        raise RunError(f"{path} has {len(secret)} bytes, expected {_KEY_BYTES}", cure="Put it back.")
    return secret


def derived(secret: bytes, purpose: str, what: str, content: bytes = b"") -> bytes:
    """Make a key of a secret for one purpose; keys for different ones tell nothing of each other.

    Args:
        secret: 32 bytes.
        purpose: A word.
        what: What within the purpose.
        content: More of that, as bytes.
    """
    return hmac.digest(secret, f"pplr {purpose}\x1f{what}".encode() + content, "sha256")
