"""Who is who in a federation, by mutual TLS: an authority, the stage server, enrolled clients, and who is revoked.

A federation's folder, which only its operator can enter:

    ca.key  ca.crt                       the authority; ca.key never leaves this folder
    server/server.key  server.crt        the stage server's own
    enrolled.jsonl  revoked.txt          who was enrolled, with which keys, and whose certificates count no more
    federation.json                      its name, and the address of the stage server
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from cryptography.x509.oid import NameOID

from pplr.errors import IdentityError, nearest
from pplr.runtimes.certificates import (
    CLIENT_AUTH,
    SERVER_AUTH,
    UNREADABLE,
    Pair,
    check_signed,
    check_usage,
    general_name,
    issue,
    load_certificate,
    new_authority,
    public_key_pem,
    read_file,
    read_pair,
    read_private,
    write_private,
)
from pplr.runtimes.revocation import EMPTY_LIST, RevocationList
from pplr.storage import storage_errors, write_atomic, write_json

__all__ = [
    "Enrolled",
    "Identity",
    "Kit",
    "RevocationList",
    "ServerIdentity",
    "enroll_client",
    "enrolled",
    "identity_of",
    "init_federation",
    "read_kit",
    "read_private",
    "read_server",
    "revoke",
]

_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_ROLES: Final = {"pplr-client": "client", "pplr-operator": "operator"}


@dataclass(frozen=True)
class Identity:
    """Who a peer's certificate says it is."""

    name: str
    role: str
    serial: int
    not_after: datetime


@dataclass(frozen=True)
class Enrolled(Identity):
    """A certificate that was handed out, whether it still counts, and its public key where that was recorded."""

    state: Literal["valid", "revoked", "expired"]
    public_key_pem: bytes | None = None


@dataclass(frozen=True)
class Kit:
    """What a client needs to join; its key is not shown when this is printed."""

    name: str
    role: str
    federation: str
    address: str
    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)


@dataclass(frozen=True)
class ServerIdentity:
    """What the stage server shows to clients, and checks them against; its key is not shown when printed."""

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    revocations: RevocationList


def init_federation(folder: Path, name: str, hosts: Sequence[str], *, days: int = 825, address: str) -> None:
    """Make a federation's authority (ECDSA P-256, ten years) and its stage server's key and certificate.

    Args:
        folder: A new or empty folder.
        name: The federation's name: 1 to 64 of ``A-Z a-z 0-9 . _ -``, not starting with a dot.
        hosts: DNS names and IP addresses by which clients reach the stage server.
        days: For how long the server's certificate holds.
        address: Where clients reach it, as HOST:PORT; HOST is one of ``hosts``.

    Raises:
        IdentityError: A name, host or address cannot be used, or the folder holds something already.
        StorageError: The folder cannot be written.
    """
    _check_name(name, "federation")
    names = [general_name(host) for host in hosts]
    _check_address(address, names)
    _own_folder(folder)
    with _locked(folder):
        authority = new_authority(name)
        server = issue(authority, "stage-server", "pplr-server", days, SERVER_AUTH, names)
        _own_folder(folder / "server")
        write_private(folder / "ca.key", authority.key_pem)
        write_atomic(folder / "ca.crt", authority.certificate_pem)
        write_private(folder / "server" / "server.key", server.key_pem)
        write_atomic(folder / "server" / "server.crt", server.certificate_pem)
        write_atomic(folder / "revoked.txt", EMPTY_LIST.encode())
        write_atomic(folder / "enrolled.jsonl", b"")
        write_json(folder / "federation.json", {"name": name, "address": address})


def enroll_client(
    folder: Path, name: str, out: Path, *, role: Literal["client", "operator"] = "client", days: int = 365
) -> None:
    """Write a startup kit for a client or an operator: its key, its certificate, ``ca.crt`` and ``kit.json``.

    The name is recorded before the kit is written, so that no kit can exist that :func:`revoke` does not know.

    Args:
        folder: The federation's folder.
        name: 1 to 64 of ``A-Z a-z 0-9 . _ -``, not starting with a dot; its earlier certificates must be void.
        out: A new or empty folder for the kit.
        role: What the certificate lets its holder do.
        days: For how long the certificate holds; never longer than the authority's own.

    Raises:
        IdentityError: The name is taken or cannot be used, or a folder is not what it should be.
        StorageError: The kit cannot be written.
    """
    _check_name(name, "client")
    if role not in _ROLES.values():
        raise IdentityError(f"the role is {role!r}", cure=nearest(role, _ROLES.values()))
    federation = _read_json(folder / "federation.json", "name", "address")
    with _locked(folder):
        records = enrolled(folder)
        if any(record.name == name and record.state == "valid" for record in records):
            raise IdentityError(
                f"{name!r} is enrolled already, with a certificate that still counts",
                cure="Choose another name, or revoke this one first.",
            )
        authority = read_pair(folder / "ca.key", folder / "ca.crt")
        own = issue(authority, name, f"pplr-{role}", days, CLIENT_AUTH)
        _own_folder(out)
        line = {"name": name, "role": role, "serial": f"{own.certificate.serial_number:x}"}
        line["not_after"] = own.certificate.not_valid_after_utc.isoformat()
        line["public_key"] = public_key_pem(own.certificate).decode()
        records_path = folder / "enrolled.jsonl"
        write_atomic(records_path, read_file(records_path) + (json.dumps(line) + "\n").encode())
    write_private(out / "client.key", own.key_pem)
    write_atomic(out / "client.crt", own.certificate_pem)
    write_atomic(out / "ca.crt", authority.certificate_pem)
    kit = {"name": name, "role": role, "federation": federation["name"], "address": federation["address"]}
    write_json(out / "kit.json", kit)


def revoke(folder: Path, name: str) -> None:
    """Put every certificate of a name on the revocation list; a running server that reads it sees so at once.

    Raises:
        IdentityError: Nobody of that name was enrolled.
    """
    with _locked(folder):
        records = enrolled(folder)
        if not (own := [record for record in records if record.name == name]):
            names = {record.name for record in records}
            raise IdentityError(
                f"nobody is enrolled as {name!r}", cure=nearest(name, names) if names else "Enroll a client first."
            )
        path, when = folder / "revoked.txt", datetime.now(UTC).date().isoformat()
        known = RevocationList(path)
        added = "".join(f"{r.serial:x}  # {name}, {when}\n" for r in own if not known.is_revoked(r.serial))
        if added:
            write_atomic(path, read_file(path) + added.encode())


def enrolled(folder: Path) -> list[Enrolled]:
    """List every certificate that was handed out, oldest first.

    Raises:
        IdentityError: The folder holds no federation, or its records are damaged.
    """
    path = folder / "enrolled.jsonl"
    lines, revocations, now = read_file(path).splitlines(), RevocationList(folder / "revoked.txt"), datetime.now(UTC)
    found = []
    try:
        for line in lines:
            record = json.loads(line)
            serial, not_after = int(record["serial"], 16), datetime.fromisoformat(record["not_after"])
            revoked = revocations.is_revoked(serial)
            state: Any = "revoked" if revoked else "expired" if not_after < now else "valid"
            key = record.get("public_key")
            key_pem = None if key is None else str(key).encode()
            found.append(Enrolled(record["name"], record["role"], serial, not_after, state, key_pem))
    except (ValueError, TypeError, KeyError) as error:
        raise IdentityError(f"{path} is damaged ({error})", cure="Put it back from a backup.") from error
    return found


def identity_of(certificate_pem: bytes, *, ca_pem: bytes | None = None, now: datetime | None = None) -> Identity:
    """Read who a peer is from its certificate, as TLS hands it over.

    The certificate must be in its period, be for client authentication, hold exactly one common name, which is the
    enrolled name, and exactly one organizational unit, which is the role.

    Args:
        certificate_pem: One certificate.
        ca_pem: The authority that must have signed it; TLS checked so already, this checks again.
        now: The time, with its zone; this moment when absent.

    Raises:
        IdentityError: The certificate does not say, or may not say, who this is.
    """
    certificate = load_certificate(certificate_pem, "the peer's certificate")
    if ca_pem is not None:
        check_signed(certificate, load_certificate(ca_pem, "the authority's certificate"))
    try:
        names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        units = [unit.value for unit in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
        check_usage(certificate, CLIENT_AUTH, now or datetime.now(UTC))
    except UNREADABLE as error:
        _refuse(f"cannot be read ({error})")
    if len(names) != 1 or not _NAME.fullmatch(str(names[0])):
        _refuse(f"names {str(names)[:200]}, expected exactly one enrolled name")
    if len(units) != 1 or units[0] not in _ROLES:
        _refuse(f"gives the role {str(units)[:200]}, expected one of {', '.join(_ROLES)}")
    return Identity(str(names[0]), _ROLES[str(units[0])], certificate.serial_number, certificate.not_valid_after_utc)


def read_kit(folder: Path) -> Kit:
    """Read a startup kit, and check that its parts belong together and count today.

    Raises:
        IdentityError: A part is missing, expired, of another party, or open to others.
    """
    told = _read_json(folder / "kit.json", "name", "role", "federation", "address")
    pair, ca_pem = _read_signed_pair(folder / "client.key", folder / "client.crt", folder / "ca.crt")
    own = identity_of(pair.certificate_pem, ca_pem=ca_pem)
    if (own.name, own.role) != (told["name"], told["role"]):
        raise IdentityError(
            f"kit.json is for {told['role']} {told['name']!r}, the certificate beside it for {own.role} {own.name!r}",
            cure="Use a startup kit as it was handed over.",
        )
    return Kit(**told, key_pem=pair.key_pem, certificate_pem=pair.certificate_pem, ca_pem=ca_pem)


def read_server(folder: Path) -> ServerIdentity:
    """Read what the stage server needs: ``server/``, ``ca.crt`` and ``revoked.txt``; ``ca.key`` may be elsewhere.

    Raises:
        IdentityError: A part is missing, expired, of another federation, or open to others.
    """
    own = folder / "server"
    pair, ca_pem = _read_signed_pair(own / "server.key", own / "server.crt", folder / "ca.crt")
    check_usage(pair.certificate, SERVER_AUTH, datetime.now(UTC))
    return ServerIdentity(pair.key_pem, pair.certificate_pem, ca_pem, RevocationList(folder / "revoked.txt"))


def _read_signed_pair(key: Path, certificate: Path, authority: Path) -> tuple[Pair, bytes]:
    pair, ca_pem = read_pair(key, certificate), read_file(authority)
    check_signed(pair.certificate, load_certificate(ca_pem, str(authority)))
    return pair, ca_pem


def _read_json(path: Path, *keys: str) -> dict[str, str]:
    """Read an object that holds text under these keys, and nothing else."""
    try:
        content = json.loads(read_file(path))
    except ValueError:
        content = None
    if (
        not isinstance(content, dict)
        or set(content) != set(keys)
        or not all(isinstance(v, str) for v in content.values())
    ):
        raise IdentityError(f"{path} is damaged, expected text for {', '.join(keys)}", cure="Put it back as it was.")
    return content


def _check_name(name: str, whose: str) -> None:
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"{name[:100]!r} cannot be the name of a {whose}",
            cure="Choose 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot.",
        )


def _check_address(address: str, names: Sequence[Any]) -> None:
    """Refuse an address that the server's certificate would not match."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise IdentityError(f"the address is {address!r}, expected HOST:PORT", cure="Such as stage.example.org:8443.")
    if general_name(host[1:-1] if host.startswith("[") else host) not in names:
        raise IdentityError(
            f"the address is at {host!r}, which is none of the server's hosts", cure=f"Add `--host {host}`."
        )


def _own_folder(folder: Path) -> None:
    """Make a folder that only this user can enter, or take an empty one."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if present := sorted(path.name for path in folder.iterdir()):
            holds = "a federation" if "ca.key" in present else "a startup kit" if "kit.json" in present else "files"
            raise IdentityError(f"{folder} holds {holds} already", cure="Choose a new folder; nothing is overwritten.")
        folder.chmod(0o700)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep every other process out of a federation's records for a while."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise IdentityError(
            f"{folder} is not a federation's folder: {error.strerror}", cure="Make one with `pplr enroll init`."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse(why: str) -> NoReturn:
    raise IdentityError(f"the peer's certificate {why}", cure="Connect with a startup kit of this federation.")
