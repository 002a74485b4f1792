"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pplr.runtimes.address import StageServerAt

__all__ = [
    "BootstrapSeed",
    "ConfigPath",
    "KitPath",
    "RunDir",
    "Samples",
    "Settings",
    "StageServer",
    "stage_server_at",
]

ConfigPath = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; all defaults when absent.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field, its value in YAML. Repeatable."),
]
StageServer = Annotated[
    str | None,
    typer.Option(
        "--stage-server",
        metavar="HOST:PORT",
        help="The server that hosts the middle blocks, by --kit; this process hosts them when both are absent.",
    ),
]
KitPath = Annotated[
    Path | None,
    typer.Option(
        "--kit",
        metavar="DIR",
        envvar="PPLR_KIT",
        help="A startup kit, or a folder of kits named as the clients. Gives the stage server's address too.",
    ),
]
BootstrapSeed = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")]
Samples = Annotated[int, typer.Option(min=1, help="Bootstrap samples.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]


def stage_server_at(address: str | None, kit: Path | None) -> StageServerAt | None:
    """Put the two options together; an address without a kit is refused, since nobody gets in without one."""
    if kit is None:
        if address is not None:
            raise typer.BadParameter(
                "it needs --kit DIR, the startup kit of `pplr enroll client`", param_hint="--stage-server"
            )
        return None
    from pplr.runtimes.address import StageServerAt
    from pplr.runtimes.memory import hand_back_large_blocks

    hand_back_large_blocks()

    return StageServerAt(kit, address)
