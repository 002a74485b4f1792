"""Keys and certificates: made, written where only their owner can read them, read back and checked."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from pplr.errors import IdentityError
from pplr.storage import write_atomic

__all__ = [
    "CLIENT_AUTH",
    "SERVER_AUTH",
    "UNREADABLE",
    "Pair",
    "check_signed",
    "check_usage",
    "general_name",
    "issue",
    "load_certificate",
    "new_authority",
    "openssh_key",
    "public_key_pem",
    "read_file",
    "read_pair",
    "read_private",
    "write_private",
]

CLIENT_AUTH: Final = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH: Final = ExtendedKeyUsageOID.SERVER_AUTH
UNREADABLE: Final = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.ExtensionNotFound)
"""What `cryptography` raises over a certificate or key that is not one, or lacks what is asked of it."""

_AUTHORITY_DAYS: Final = 3650
_CLOCK_SKEW: Final = timedelta(minutes=5)
_HOST: Final = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")


@dataclass(frozen=True)
class Pair:
    """A certificate and the private key that belongs to it, which is not shown when this is printed."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as text."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as text, unencrypted."""
        form, cipher = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return self.key.private_bytes(serialization.Encoding.PEM, form, cipher)


def new_authority(name: str) -> Pair:
    """Make a certificate authority for ten years, which signs certificates of parties only, never of authorities."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), _subject(name, "pplr-authority")
    start = datetime.now(UTC).replace(microsecond=0)
    draft = _draft(subject, key, subject, key, start, start + timedelta(days=_AUTHORITY_DAYS))
    draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Pair(draft.add_extension(_key_usage(authority=True), critical=True).sign(key, hashes.SHA256()), key)


def issue(
    authority: Pair,
    name: str,
    unit: str,
    days: int,
    purpose: ObjectIdentifier,
    alternative_names: Sequence[x509.GeneralName] = (),
) -> Pair:
    """Make a party's key, and have the authority certify it.

    Args:
        authority: Who signs.
        name: The common name.
        unit: The organizational unit.
        days: For how long, never longer than the authority itself.
        purpose: The one extended key usage.
        alternative_names: Where a server is reached.

    Raises:
        IdentityError: ``days`` is not positive, or goes past the authority's own end.
    """
    key, start, last = (
        ec.generate_private_key(ec.SECP256R1()),
        datetime.now(UTC).replace(microsecond=0),
        authority.certificate.not_valid_after_utc,
    )
    most = (last - start).days
    if not 1 <= days <= most:
        raise IdentityError(
            f"a certificate for {days} days was asked for, of an authority that ends on {last:%Y-%m-%d}",
            cure=f"Choose 1 to {most} days." if most >= 1 else "Make a new federation.",
        )
    end = start + timedelta(days=days)
    draft = _draft(_subject(name, unit), key, authority.certificate.subject, authority.key, start, end)
    draft = draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    draft = draft.add_extension(_key_usage(authority=False), critical=True)
    draft = draft.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if alternative_names:
        draft = draft.add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
    return Pair(draft.sign(authority.key, hashes.SHA256()), key)


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """Read exactly one certificate.

    Args:
        pem: Its text.
        what: What to call it in an error.

    Raises:
        IdentityError: It is none, or more than one.
    """
    try:
        (certificate,) = x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        raise IdentityError(
            f"{what} is not exactly one PEM certificate", cure="Hand over the certificate of a startup kit."
        ) from error
    return certificate


def public_key_pem(certificate: x509.Certificate) -> bytes:
    """Write a certificate's public key as PEM."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return certificate.public_key().public_bytes(serialization.Encoding.PEM, form)


def openssh_key(key_pem: bytes) -> bytes:
    """Write a private key in OpenSSH's form, which Flower reads."""
    key = serialization.load_pem_private_key(key_pem, password=None)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def check_signed(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Refuse a certificate that the authority did not sign.

    Raises:
        IdentityError: Another authority signed it, or it was altered.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (*UNREADABLE, InvalidSignature) as error:
        raise IdentityError(
            "the certificate is not signed by this federation's authority", cure="Enroll with this federation."
        ) from error


def check_usage(certificate: x509.Certificate, purpose: ObjectIdentifier, now: datetime) -> None:
    """Refuse a certificate outside its period, one for another purpose, and an authority's own.

    Raises:
        IdentityError: It may not be used so, or not now.
    """
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise IdentityError(
            f"the certificate holds from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, and it is "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
            cure="Check the clock, or enroll again for a new certificate.",
        )
    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        allowed = purpose in usages and not authority
    except UNREADABLE:
        allowed = False
    if not allowed:
        raise IdentityError(
            f"the certificate is not for {'client' if purpose == CLIENT_AUTH else 'server'} authentication",
            cure="Use the certificate that was made for this party.",
        )


def general_name(host: str) -> x509.GeneralName:
    """Turn a DNS name or an IP address into what a server's certificate holds.

    Raises:
        IdentityError: It is neither.

    Example:
        >>> general_name("127.0.0.1").value, general_name("stage.example.org").value
        (IPv4Address('127.0.0.1'), 'stage.example.org')
    """
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if len(host) > 253 or not _HOST.fullmatch(host) or host.rpartition(".")[2].isdigit():
        raise IdentityError(
            f"the host {host!r} is neither a DNS name nor an IP address",
            cure="Give the name or address by which clients reach the stage server, without a port.",
        )
    return x509.DNSName(host.lower())


def write_private(path: Path, content: bytes) -> None:
    """Write a file that from its first byte on only its owner can read; whole or not at all.

    Raises:
        StorageError: The disk is full or refuses.
    """
    write_atomic(path, content, mode=0o600)


def read_private(path: Path) -> bytes:
    """Read a key file that belongs to this user and that nobody else may touch.

    A link is followed; what counts is the file it leads to.

    Raises:
        IdentityError: It is missing or not a regular file, or another user owns it or may read, write or run it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not make it wait
    except OSError as error:
        raise IdentityError(
            f"the key file {path} cannot be read: {error.strerror}", cure="Name a folder that `pplr enroll` wrote."
        ) from error
    try:
        seen = os.fstat(descriptor)
        mode = stat.S_IMODE(seen.st_mode)
        if not stat.S_ISREG(seen.st_mode):
            raise IdentityError(
                f"the key file {path} is not a regular file (mode {mode:04o}), expected one of mode 0600",
                cure="Name the key's file itself.",
            )
        if seen.st_uid != os.geteuid():
            raise IdentityError(
                f"the key file {path} is owned by user {seen.st_uid}, expected user {os.geteuid()}, who runs this",
                cure=f"Run as its owner, or `chown` it and `chmod 600 {path}`.",
            )
        if mode & 0o077:
            raise IdentityError(
                f"the key file {path} has mode {mode:04o}, expected 0600: others can get at the key",
                cure=f"Run `chmod 600 {path}`; if somebody else had access, enroll again.",
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """Read a file that others may read.

    Raises:
        IdentityError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(
            f"{path} cannot be read: {error.strerror or error}", cure="Name a folder that `pplr enroll` wrote."
        ) from error


def read_pair(key_path: Path, certificate_path: Path) -> Pair:
    """Read a private key and its certificate, and check that they belong together.

    Raises:
        IdentityError: One cannot be used, others can get at the key, or they do not belong together.
    """
    content = read_private(key_path)
    certificate = load_certificate(read_file(certificate_path), str(certificate_path))
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{key_path} is not an unencrypted ECDSA key", cure="Put the key back, or enroll again.")
    if key.public_key() != certificate.public_key():
        raise IdentityError(
            f"the key {key_path} does not belong to the certificate {certificate_path}",
            cure="Put both back from one folder that `pplr enroll` wrote.",
        )
    return Pair(certificate, key)


def _subject(name: str, unit: str) -> x509.Name:
    parts = ((NameOID.ORGANIZATIONAL_UNIT_NAME, unit), (NameOID.COMMON_NAME, name))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


def _draft(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    """Begin a certificate, valid a little before now for clocks that are late."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
