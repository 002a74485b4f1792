"""``pplr enroll``: what it writes, what it says, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pplr.apps import enrolling
from pplr.apps.command_group import CommandGroup
from pplr.runtimes.identity import enrolled, read_kit, read_server

ROOT = typer.Typer(cls=CommandGroup, no_args_is_help=True)
ROOT.add_typer(enrolling.app, name="enroll")


def run(*arguments: object):
    return CliRunner().invoke(ROOT, ["enroll", *map(str, arguments)])


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    folder = tmp_path / "federation"
    hosts = ("--host", "localhost", "--host", "127.0.0.1")
    told = run("init", "--out", folder, "--name", "shops", *hosts, "--address", "127.0.0.1:8443")
    assert told.exit_code == 0, told.output
    assert str(folder) in told.output
    assert "ca.key to nobody" in told.output
    return folder


def test_a_federation_from_its_beginning_to_a_revocation(federation: Path, tmp_path: Path) -> None:
    assert "Nobody is enrolled" in run("list", "--federation", federation).output
    told = run("client", "alice", "--federation", federation, "--out", tmp_path / "alice")
    assert told.exit_code == 0, told.output
    assert str(tmp_path / "alice") in told.output
    assert "over a safe channel" in told.output
    assert "Never hand over ca.key" in told.output
    told = run("client", "ops", "--federation", federation, "--out", tmp_path / "ops", "--operator", "--days", "7")
    assert told.exit_code == 0, told.output
    assert (read_kit(tmp_path / "alice").role, read_kit(tmp_path / "ops").role) == ("client", "operator")
    assert read_kit(tmp_path / "alice").address == "127.0.0.1:8443"
    revocations = read_server(federation).revocations
    alice, ops = enrolled(federation)
    assert (ops.not_after - alice.not_after).days < -350
    told = run("revoke", "alice", "--federation", federation)
    assert told.exit_code == 0, told.output
    assert revocations.is_revoked(alice.serial)
    assert not revocations.is_revoked(ops.serial)
    lines = [line.split() for line in run("list", "--federation", federation).output.splitlines()]
    assert ["name", "role", "expires", "state"] in lines
    assert ["alice", "client", f"{alice.not_after:%Y-%m-%d}", "revoked"] in lines
    assert ["ops", "operator", f"{ops.not_after:%Y-%m-%d}", "valid"] in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("client", ".alice", "--federation", "F", "--out", "K"), "cannot be the name of a client"),
        (("client", "bob", "--federation", "F", "--out", "F"), "holds a federation already"),
        (("client", "bob", "--federation", "N", "--out", "K"), "cannot be read"),
        (("revoke", "nobody", "--federation", "F"), "nobody is enrolled as 'nobody'"),
        (("revoke", "nobody", "--federation", "N"), "pplr enroll init"),
        (("list", "--federation", "N"), "cannot be read"),
        (("init", "--out", "F", "--name", "a", "--host", "b", "--address", "b:1"), "holds a federation already"),
        (("init", "--out", "N", "--name", "a", "--host", "b", "--address", "c:1"), "Add `--host c`"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    arguments: tuple[str, ...], words: str, federation: Path, tmp_path: Path
) -> None:
    places = {"F": federation, "K": tmp_path / "kit", "N": tmp_path / "nowhere"}
    told = run(*(places.get(argument, argument) for argument in arguments))
    assert told.exit_code == 1
    assert told.output.startswith("error: ")
    assert words in told.output
    assert told.output.count("\n") == 1
    assert not (tmp_path / "kit").exists()
    assert not (tmp_path / "nowhere").exists()
    assert run("client", "bob", "--federation", federation, "--out", tmp_path / "kit").exit_code == 0


def test_what_is_missing_or_out_of_range_is_a_usage_error(federation: Path, tmp_path: Path) -> None:
    assert run("client", "bob", "--federation", federation).exit_code == 2
    out = ("--federation", federation, "--out", tmp_path / "kit")
    assert run("client", "bob", *out, "--days", "0").exit_code == 2
    assert run("init", "--out", tmp_path / "new", "--name", "a", "--address", "b:1").exit_code == 2
    assert run("client", "bob", *out, "--days", "1").exit_code == 0


def test_help_tells_the_commands() -> None:
    told = CliRunner().invoke(enrolling.app, ["--help"]).output
    assert all(command in told for command in ("init", "client", "revoke", "list"))
