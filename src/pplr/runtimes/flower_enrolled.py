"""Who may join a federation's link, and where the link is; without torch, since a link's server computes nothing."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from pplr.errors import FederationError, IdentityError
from pplr.runtimes.address import LinkAddress
from pplr.runtimes.certificates import read_private, write_private
from pplr.runtimes.identity import Enrolled, enrolled
from pplr.storage import write_json

__all__ = ["client_names", "client_of_key", "keep_nodes", "link_of", "prepare_link"]

_SECRET, _LINK = "link.secret", "link.json"


def _valid(federation: Path) -> list[Enrolled]:
    return [own for own in enrolled(federation) if own.state == "valid" and own.role == "client"]


def client_names(federation: Path) -> list[str]:
    """Name the clients whose certificates count, in order.

    Raises:
        IdentityError: There is none, or one was enrolled before keys were recorded.
    """
    valid = _valid(federation)
    if not valid:
        raise IdentityError(f"{federation} has no client whose certificate counts", cure="Run `pplr enroll client`.")
    if old := [own.name for own in valid if own.public_key_pem is None]:
        raise IdentityError(
            f"client {old[0]} was enrolled before public keys were recorded", cure="Revoke it and enroll it again."
        )
    return sorted({own.name for own in valid})


def client_of_key(federation: Path) -> dict[bytes, str]:
    """Say which key is whose, of those that count now."""
    return {own.public_key_pem: own.name for own in _valid(federation) if own.public_key_pem is not None}


def prepare_link(state: Path, address: str) -> Path:
    """Make the folder of a link's state, with the operator's secret; return the secret's file."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = state / _SECRET
    if not secret.exists():
        write_private(secret, secrets.token_hex(32).encode())
    write_json(state / _LINK, {"address": address})
    return secret


def link_of(federation: Path, state: Path) -> LinkAddress:
    """Read where a link is, and the operator's secret.

    Raises:
        FederationError: The folder is none of a link.
    """
    try:
        address = str(json.loads((state / _LINK).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(
            f"{state} is no state folder of a server ({type(error).__name__})", cure="Start `pplr server` first."
        ) from error
    return LinkAddress(address, (federation / "ca.crt").read_bytes(), read_private(state / _SECRET))


def keep_nodes(federation: Path, state: Path, stopping: threading.Event, note: Callable[[str], None]) -> None:
    """Let the link know who is enrolled, and who is not any more, until told to stop.

    Args:
        federation: The federation's folder.
        state: The link's.
        stopping: Ends this.
        note: Told of every change.
    """
    from pplr.runtimes.flower_link import Operator

    operator = Operator(link_of(federation, state))
    told: str | None = None
    while not stopping.is_set():
        try:
            wanted, there = client_of_key(federation), operator.nodes()
            for key, name in wanted.items():
                if key not in there:
                    operator.register(key)
                    note(f"client {name} may join")
            for key, node in there.items():
                if key not in wanted:
                    operator.unregister(node)
                    note("a client may join no more: its certificate was revoked, or has expired")
            told = None
        except Exception as error:  # the link is not up yet, or the records cannot be read: nobody new is let in
            if told != str(error):
                told = str(error)
                note(f"the link's clients are not brought up to date yet ({type(error).__name__})")
        stopping.wait(1.0)
    operator.close()
