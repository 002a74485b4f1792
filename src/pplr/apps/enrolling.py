"""The commands of ``pplr enroll``: init, client, revoke, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Say who belongs to a federation, by certificates for mutual TLS.")

Federation = Annotated[Path, typer.Option(metavar="DIR", help="The federation's folder, of `pplr enroll init`.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot.")]


@app.command("init")
def init(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder for the federation's keys.")],
    name: Annotated[str, typer.Option(help="The federation's name.")],
    host: Annotated[list[str], typer.Option(help="A DNS name or IP address of the stage server. Repeatable.")],
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where clients reach the stage server.")],
    days: Annotated[int, typer.Option(min=1, help="For how long the server's certificate holds.")] = 825,
) -> None:
    """Make a federation's certificate authority, and its stage server's key and certificate."""
    from pplr.apps.terminal import Screen
    from pplr.runtimes.identity import init_federation

    init_federation(out, name, host, days=days, address=address)
    screen = Screen()
    screen.line(f"wrote the authority of {name} and its stage server's certificate ({days} days) to {out}")
    screen.line(
        "To the stage server's machine: server/, ca.crt and revoked.txt, over a safe channel. "
        "Hand ca.key to nobody, and keep a copy of this folder offline."
    )
    screen.line(f"Next: pplr enroll client NAME --federation {out} --out KIT")


@app.command("client")
def client(
    name: Name,
    federation: Federation,
    out: Annotated[Path, typer.Option(metavar="KIT", help="A new or empty folder for the startup kit.")],
    operator: Annotated[bool, typer.Option("--operator", help="Enroll an operator instead of a client.")] = False,
    days: Annotated[int, typer.Option(min=1, help="For how long the certificate holds.")] = 365,
) -> None:
    """Write a startup kit: the key and certificate by which the stage server knows a client."""
    from pplr.apps.terminal import Screen
    from pplr.runtimes.identity import enroll_client

    role = "operator" if operator else "client"
    enroll_client(federation, name, out, role="operator" if operator else "client", days=days)
    screen = Screen()
    screen.line(f"wrote the startup kit of {role} {name} ({days} days) to {out}")
    screen.line(
        f"Hand the whole folder to {name} over a safe channel, then delete it here: its client.key lets anyone act as "
        f"{name}. Never hand over ca.key."
    )


@app.command("revoke")
def revoke_name(name: Name, federation: Federation) -> None:
    """Let every certificate of a name count no more."""
    from pplr.apps.terminal import Screen
    from pplr.runtimes.identity import revoke

    revoke(federation, name)
    screen = Screen()
    screen.line(f"revoked every certificate of {name} in {federation / 'revoked.txt'}")
    screen.line(
        "A stage server that reads this file follows at once; copy it to one on another machine. No restart is needed."
    )


@app.command("list")
def list_enrolled(federation: Federation) -> None:
    """List who was enrolled, until when, and whose certificates still count."""
    from pplr.apps.tables import Table
    from pplr.apps.terminal import Screen
    from pplr.runtimes.identity import enrolled

    names = ("name", "role", "expires", "state")
    rows = [(own.name, own.role, f"{own.not_after:%Y-%m-%d}", own.state) for own in enrolled(federation)]
    if not rows:
        Screen().line("Nobody is enrolled yet.")
        return
    Screen().table(Table(names, rows, texts=names))
