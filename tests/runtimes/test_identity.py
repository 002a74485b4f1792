"""Who gets in by mutual TLS, and who does not; each refusal beside the same thing done right."""

from __future__ import annotations

import json
import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pplr.errors import IdentityError, PplrError
from pplr.runtimes import certificates, identity
from pplr.runtimes.identity import (
    Identity,
    RevocationList,
    enroll_client,
    enrolled,
    identity_of,
    init_federation,
    read_kit,
    read_private,
    read_server,
    revoke,
)

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    folder = tmp_path / "federation"
    init_federation(folder, "shops", ["localhost", "127.0.0.1"], address="localhost:8443")
    return folder


@pytest.fixture
def kit(federation: Path, tmp_path: Path) -> Path:
    enroll_client(federation, "alice", tmp_path / "alice")
    return tmp_path / "alice"


def forge(
    federation: Path,
    out: Path,
    *,
    names=("alice",),
    units=("pplr-client",),
    usages=(ExtendedKeyUsageOID.CLIENT_AUTH,),
    start=NOW - DAY,
    end=NOW + DAY,
    ca=False,
) -> bytes:
    """Certify the key of a kit with anything at all, signed by the federation's own authority."""
    ca_key = serialization.load_pem_private_key((federation / "ca.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((federation / "ca.crt").read_bytes()).subject
    key = serialization.load_pem_private_key((out / "client.key").read_bytes(), None)
    kinds = [(NameOID.COMMON_NAME, name) for name in names]
    kinds += [(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units]
    draft = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(*kind) for kind in kinds]))
    draft = draft.issuer_name(issuer).public_key(key.public_key()).serial_number(x509.random_serial_number())
    draft = draft.not_valid_before(start).not_valid_after(end)
    draft = draft.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if usages:
        draft = draft.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    made = draft.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (out / "client.crt").write_bytes(made)
    return made


def knock(federation: Path, kit: Path | None, trust: Path | None = None, host: str = "localhost") -> Identity | None:
    """Shake hands on loopback; return who the server saw, or nothing when either side refused."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(federation / "server" / "server.crt", federation / "server" / "server.key")
    server.load_verify_locations(federation / "ca.crt")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str((trust or federation) / "ca.crt"))
    if kit is not None:
        client.load_cert_chain(kit / "client.crt", kit / "client.key")
    seen: list[Identity] = []

    def serve(listener: socket.socket) -> None:
        try:
            plain, _ = listener.accept()
            plain.settimeout(10)
            with plain, server.wrap_socket(plain, server_side=True) as connection:
                pem = ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True)).encode()
                seen.append(identity_of(pem, ca_pem=(federation / "ca.crt").read_bytes()))
                connection.sendall(b"welcome")
        except (OSError, IdentityError):
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        told = b""
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=host) as connection,
            ):
                told = connection.recv(16)
        except OSError:
            pass
        thread.join(20)
    assert not thread.is_alive()
    assert bool(seen) == (told == b"welcome")
    return seen[0] if seen else None


def test_an_enrolled_client_gets_in_under_its_own_name(federation: Path, kit: Path) -> None:
    seen = knock(federation, kit)
    (own,) = enrolled(federation)
    assert seen == Identity("alice", "client", own.serial, own.not_after)
    assert knock(federation, kit, host="127.0.0.1") == seen


def test_an_operator_gets_in_as_one(federation: Path, tmp_path: Path) -> None:
    enroll_client(federation, "root", tmp_path / "root", role="operator")
    assert knock(federation, tmp_path / "root").role == "operator"
    assert read_kit(tmp_path / "root").role == "operator"


def test_whoever_is_not_of_the_federation_stays_out(federation: Path, kit: Path, tmp_path: Path) -> None:
    init_federation(tmp_path / "other", "shops", ["localhost"], address="localhost:8443")
    enroll_client(tmp_path / "other", "alice", tmp_path / "stranger")
    assert knock(tmp_path / "other", tmp_path / "stranger") is not None
    assert knock(federation, tmp_path / "stranger") is None  # another authority of the very same name
    assert knock(federation, None) is None
    assert knock(federation, kit, trust=tmp_path / "other") is None  # the client does not trust this server
    assert knock(federation, kit, host="elsewhere.example") is None
    assert knock(federation, kit) is not None


def test_only_the_period_counts_for_an_expired_certificate(federation: Path, kit: Path) -> None:
    forge(federation, kit)
    assert knock(federation, kit) is not None
    assert read_kit(kit).name == "alice"
    for start, end in ((NOW - 2 * DAY, NOW - DAY), (NOW + DAY, NOW + 2 * DAY)):
        made = forge(federation, kit, start=start, end=end)
        assert knock(federation, kit) is None
        with pytest.raises(IdentityError, match="the certificate holds from"):
            read_kit(kit)
        assert identity_of(made, now=start + DAY / 2).name == "alice"
        with pytest.raises(IdentityError, match="Check the clock"):
            identity_of(made)


@pytest.mark.parametrize(
    ("forgery", "words"),
    [
        ({"names": ("alice", "bob")}, "exactly one enrolled name"),
        ({"names": ()}, "exactly one enrolled name"),
        ({"names": ("../bob",)}, "exactly one enrolled name"),
        ({"names": ("bob\n",)}, "exactly one enrolled name"),
        ({"units": ("pplr-client", "pplr-operator")}, "expected one of pplr-client, pplr-operator"),
        ({"units": ("pplr-authority",)}, "expected one of"),
        ({"units": ("operator",)}, "expected one of"),
        ({"units": ()}, "expected one of"),
        ({"usages": (ExtendedKeyUsageOID.SERVER_AUTH,)}, "not for client authentication"),
        ({"usages": (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)}, "not for client authentication"),
        ({"usages": ()}, "not for client authentication"),
        ({"ca": True}, "not for client authentication"),
    ],
)
def test_a_certificate_that_does_not_say_who_it_is_is_refused_even_if_well_signed(
    federation: Path, kit: Path, forgery: dict, words: str
) -> None:
    ca_pem = (federation / "ca.crt").read_bytes()
    assert identity_of(forge(federation, kit), ca_pem=ca_pem).name == "alice"
    with pytest.raises(IdentityError, match=words):
        identity_of(forge(federation, kit, **forgery), ca_pem=ca_pem)
    assert knock(federation, kit) is None


def test_a_signature_of_another_authority_is_seen_again(federation: Path, kit: Path, tmp_path: Path) -> None:
    pem = (kit / "client.crt").read_bytes()
    init_federation(tmp_path / "other", "shops", ["localhost"], address="localhost:8443")
    assert identity_of(pem) == identity_of(pem, ca_pem=(federation / "ca.crt").read_bytes())
    with pytest.raises(IdentityError, match="not signed by this federation"):
        identity_of(pem, ca_pem=(tmp_path / "other" / "ca.crt").read_bytes())
    for own in ("server/server.crt", "ca.crt"):  # well signed, but nobody's of a client
        with pytest.raises(IdentityError, match="not for client authentication"):
            identity_of((federation / own).read_bytes(), ca_pem=(federation / "ca.crt").read_bytes())


@pytest.mark.parametrize(
    "content", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(content: bytes, kit: Path) -> None:
    pem = (kit / "client.crt").read_bytes()
    assert identity_of(pem).name == "alice"
    for several in (content, pem + pem):
        with pytest.raises(IdentityError, match="not exactly one PEM certificate"):
            identity_of(several)


def test_a_revoked_client_is_known_without_a_restart(federation: Path, kit: Path, tmp_path: Path) -> None:
    enroll_client(federation, "bob", tmp_path / "bob")
    revocations = read_server(federation).revocations
    alice, bob = knock(federation, kit), knock(federation, tmp_path / "bob")
    assert not revocations.is_revoked(alice.serial)
    revoke(federation, "alice")
    assert revocations.is_revoked(alice.serial)
    assert not revocations.is_revoked(bob.serial)
    before = (federation / "revoked.txt").read_bytes()
    revoke(federation, "alice")
    assert (federation / "revoked.txt").read_bytes() == before
    assert [own.state for own in enrolled(federation)] == ["revoked", "valid"]


def test_without_a_whole_revocation_list_nobody_is_let_in(federation: Path) -> None:
    path = federation / "revoked.txt"
    revocations = RevocationList(path)
    good = path.read_bytes()
    for bad in (
        b"",
        good + b"12ab",
        good + b"not hex\n",
        good + b"12 34\n",
        good + b"\xff\n",
        good + b"f" * 41 + b"\n",
    ):
        path.write_bytes(bad)
        for _ in range(2):  # it is not forgotten that the list is bad
            with pytest.raises(IdentityError, match="nobody is let in"):
                revocations.is_revoked(1)
        with pytest.raises(IdentityError):
            read_server(federation)
        path.write_bytes(good + b"12AB  # someone\n\n")
        assert revocations.is_revoked(0x12AB)
        assert not revocations.is_revoked(1)
    path.unlink()
    with pytest.raises(IdentityError, match="nobody is let in"):
        revocations.is_revoked(1)


def test_an_unknown_name_is_told_the_nearest(federation: Path, kit: Path) -> None:
    with pytest.raises(IdentityError, match="Did you mean 'alice'"):
        revoke(federation, "alcie")
    with pytest.raises(IdentityError, match="not a federation's folder"):
        revoke(federation / "nowhere", "alice")
    revoke(federation, "alice")


def test_a_name_is_free_again_only_when_its_certificate_counts_no_more(
    federation: Path, kit: Path, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match="enrolled already"):
        enroll_client(federation, "alice", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    revoke(federation, "alice")
    enroll_client(federation, "alice", tmp_path / "again")
    assert [own.state for own in enrolled(federation)] == ["revoked", "valid"]
    records = federation / "enrolled.jsonl"
    first, second = map(json.loads, records.read_text().splitlines())
    second["not_after"] = (NOW - DAY).isoformat()
    records.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    enroll_client(federation, "alice", tmp_path / "third")
    assert [own.state for own in enrolled(federation)] == ["revoked", "expired", "valid"]
    revoke(federation, "alice")
    assert {own.state for own in enrolled(federation)} == {"revoked"}


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "é", "x" * 65, "a\n", "-" * 65])
def test_a_name_that_could_be_taken_for_something_else_is_refused(name: str, federation: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot be the name of a client"):
        enroll_client(federation, name, tmp_path / "kit")
    with pytest.raises(IdentityError, match="cannot be the name of a federation"):
        init_federation(tmp_path / "new", name, ["localhost"], address="localhost:1")
    assert not (tmp_path / "kit").exists()
    enroll_client(federation, "x" * 64, tmp_path / "kit")
    assert read_kit(tmp_path / "kit").name == "x" * 64


@pytest.mark.parametrize(
    ("hosts", "address", "words"),
    [
        (["local host"], "localhost:1", "neither a DNS name nor an IP"),
        (["300.1.1.1"], "300.1.1.1:1", "neither a DNS name nor an IP"),
        (["localhost"], "localhost", "expected HOST:PORT"),
        (["localhost"], "localhost:0", "expected HOST:PORT"),
        (["localhost"], "localhost:70000", "expected HOST:PORT"),
        (["localhost"], "example.org:8443", "Add `--host example.org`"),
        ([], "localhost:1", "none of the server's hosts"),
    ],
)
def test_a_server_that_no_client_could_verify_is_refused(
    hosts: list[str], address: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(IdentityError, match=words):
        init_federation(tmp_path / "new", "shops", hosts, address=address)
    assert not (tmp_path / "new").exists()
    init_federation(tmp_path / "new", "shops", ["Stage.example.org", "::1"], address="[::1]:65535")
    assert read_server(tmp_path / "new")


def test_nothing_is_overwritten(federation: Path, kit: Path, tmp_path: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    before = content()
    for folder in (federation, kit, tmp_path / "mine"):
        with pytest.raises(IdentityError, match="nothing is overwritten"):
            init_federation(folder, "shops", ["localhost"], address="localhost:1")
        with pytest.raises(IdentityError, match="nothing is overwritten"):
            enroll_client(federation, "bob", folder)
    assert content() == before
    (tmp_path / "empty").mkdir()
    enroll_client(federation, "bob", tmp_path / "empty")


def test_keys_are_only_their_owners_from_their_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: dict[str, int] = {}
    write = os.fdopen

    def watched(descriptor: int, *args, **options):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        modes[name] = stat.S_IMODE(os.fstat(descriptor).st_mode)
        return write(descriptor, *args, **options)

    before = os.umask(0)
    try:
        monkeypatch.setattr(certificates.os, "fdopen", watched)
        init_federation(tmp_path / "f", "shops", ["localhost"], address="localhost:1")
        enroll_client(tmp_path / "f", "alice", tmp_path / "kit")
    finally:
        os.umask(before)
    written = {name: mode for name, mode in modes.items() if name.endswith(".tmp") and ".key." in name}
    assert len(written) == 3
    assert set(written.values()) == {0o600}
    for folder in (tmp_path / "f", tmp_path / "f" / "server", tmp_path / "kit"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for key in tmp_path.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_get_at_is_refused(mode: int, federation: Path, kit: Path, tmp_path: Path) -> None:
    keys = [kit / "client.key", federation / "server" / "server.key", federation / "ca.key"]
    uses = [
        lambda: read_kit(kit),
        lambda: read_server(federation),
        lambda: enroll_client(federation, f"n{mode}", tmp_path / f"n{len(list(tmp_path.iterdir()))}"),
    ]
    for key, use in zip(keys, uses, strict=True):
        key.chmod(mode)
        with pytest.raises(IdentityError, match=rf"mode {mode:04o}, expected 0600.*chmod 600"):
            use()
        key.chmod(0o600)
        use()


def test_a_key_must_be_a_file_of_ones_own(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = kit / "client.key"
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(0o700)
    for odd in ("pipe", "folder"):
        with pytest.raises(IdentityError, match="not a regular file"):
            read_private(tmp_path / odd)
    with pytest.raises(IdentityError, match="cannot be read"):
        read_private(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(key)
    assert read_private(key) == read_private(tmp_path / "link") == key.read_bytes()
    key.chmod(0o644)
    with pytest.raises(IdentityError, match="0644"):
        read_private(tmp_path / "link")
    key.chmod(0o600)
    monkeypatch.setattr(certificates.os, "geteuid", lambda: key.stat().st_uid + 1)
    with pytest.raises(IdentityError, match="is owned by user"):
        read_private(key)


def test_a_kit_is_one_piece(federation: Path, kit: Path, tmp_path: Path) -> None:
    enroll_client(federation, "bob", tmp_path / "bob")
    init_federation(tmp_path / "other", "shops", ["localhost"], address="localhost:8443")
    told = read_kit(kit)
    assert (told.name, told.role, told.federation, told.address) == ("alice", "client", "shops", "localhost:8443")
    assert told.key_pem == (kit / "client.key").read_bytes()
    assert told.certificate_pem == (kit / "client.crt").read_bytes()
    assert told.ca_pem == (federation / "ca.crt").read_bytes()
    swaps = {
        "client.crt": (tmp_path / "bob" / "client.crt", "does not belong to the certificate"),
        "client.key": (tmp_path / "bob" / "client.key", "does not belong to the certificate"),
        "kit.json": (tmp_path / "bob" / "kit.json", "kit.json is for client 'bob'"),
        "ca.crt": (tmp_path / "other" / "ca.crt", "not signed by this federation"),
    }
    for name, (source, words) in swaps.items():
        own = (kit / name).read_bytes()
        (kit / name).write_bytes(source.read_bytes())
        with pytest.raises(IdentityError, match=words):
            read_kit(kit)
        (kit / name).write_bytes(b"{}")
        with pytest.raises(IdentityError):
            read_kit(kit)
        (kit / name).unlink()
        with pytest.raises(IdentityError, match=name):
            read_kit(kit)
        (kit / name).write_bytes(own)
        (kit / name).chmod(0o600)
        assert read_kit(kit) == told


def test_the_role_in_a_kit_is_the_certificates(kit: Path) -> None:
    told = json.loads((kit / "kit.json").read_text())
    (kit / "kit.json").write_text(json.dumps(told | {"role": "operator"}))
    with pytest.raises(IdentityError, match=r"operator 'alice'.*for client 'alice'"):
        read_kit(kit)


def test_a_server_runs_without_the_authoritys_key_and_not_on_a_clients_certificate(federation: Path, kit: Path) -> None:
    (federation / "ca.key").unlink()
    own = read_server(federation)
    assert own.ca_pem == (federation / "ca.crt").read_bytes()
    assert own.key_pem == (federation / "server" / "server.key").read_bytes()
    for kind in ("key", "crt"):
        (federation / "server" / f"server.{kind}").write_bytes((kit / f"client.{kind}").read_bytes())
    with pytest.raises(IdentityError, match="not for server authentication"):
        read_server(federation)


def test_no_key_is_shown(federation: Path, kit: Path) -> None:
    secret = (kit / "client.key").read_text().splitlines()[1]
    assert secret in read_kit(kit).key_pem.decode()
    assert secret not in repr(read_kit(kit))
    assert "PRIVATE" not in repr(read_server(federation))
    (kit / "client.key").write_text(secret)
    with pytest.raises(IdentityError, match="not an unencrypted ECDSA key") as told:
        read_kit(kit)
    assert secret not in str(told.value)
    assert told.value.__cause__ is None


def test_a_certificate_never_outlives_its_authority(federation: Path, tmp_path: Path) -> None:
    for days in (0, -1, 4000, 10**12):
        with pytest.raises(IdentityError, match="Choose 1 to 36"):
            enroll_client(federation, "alice", tmp_path / "kit", days=days)
    assert enrolled(federation) == []
    enroll_client(federation, "alice", tmp_path / "kit", days=1)
    assert enrolled(federation)[0].not_after - datetime.now(UTC) <= DAY


def test_an_unknown_role_and_damaged_records_are_refused(federation: Path, kit: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="Did you mean 'operator'"):
        enroll_client(federation, "bob", tmp_path / "bob", role="oprator")
    records = federation / "enrolled.jsonl"
    good = records.read_bytes()
    for bad in (good[:-20], good + b"{}\n", good + b"[]\n", b"\xff\n"):
        records.write_bytes(bad)
        with pytest.raises(IdentityError, match="is damaged"):
            enroll_client(federation, "bob", tmp_path / "bob")
    records.write_bytes(good)
    enroll_client(federation, "bob", tmp_path / "bob")


def test_a_kit_that_could_not_be_written_is_on_record(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(identity, "write_private", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            enroll_client(federation, "alice", tmp_path / "kit")
    assert [own.name for own in enrolled(federation)] == ["alice"]
    revoke(federation, "alice")
    assert [own.state for own in enrolled(federation)] == ["revoked"]


def test_two_at_a_time_get_one_name_once(federation: Path, tmp_path: Path) -> None:
    outcomes: list[str] = []

    def enroll(number: int) -> None:
        try:
            enroll_client(federation, "alice", tmp_path / f"kit{number}")
            outcomes.append("in")
        except PplrError:
            outcomes.append("refused")

    threads = [threading.Thread(target=enroll, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["in"] + ["refused"] * 5
    assert len(enrolled(federation)) == 1


def test_a_key_that_is_not_of_this_kind_is_refused(kit: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    (kit / "client.key").write_bytes(other)
    with pytest.raises(IdentityError, match="not an unencrypted ECDSA key"):
        read_kit(kit)
