"""The two long-lived commands of a federation through Flower: ``pplr server`` and ``pplr client``."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pplr.apps.options import wait_passively

__all__ = ["client", "server"]


def server(
    federation: Annotated[Path, typer.Option(metavar="DIR", help="The federation's folder, of `pplr enroll init`.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The server's own folder; made when absent.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "0.0.0.0:8000",
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="How this machine reaches it; as it listens when absent.")
    ] = None,
) -> None:
    """Serve the link over which a federation's clients and its operator meet (Flower's SuperLink)."""
    from pplr.apps.terminal import Screen
    from pplr.runtimes.flower_federation import keep_nodes, prepare_link
    from pplr.runtimes.flower_settings import load_flower

    screen = Screen()
    host, _, port = listen.rpartition(":")
    if not (host and port.isdigit()):
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT", param_hint="--listen")
    with screen.busy("loading libraries"):
        load_flower()
        from pplr.runtimes.flower_link import serve_link
    secret = prepare_link(state, address or f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")  # noqa: S104
    stopping = threading.Event()
    keeper = threading.Thread(target=keep_nodes, args=(federation, state, stopping, screen.line), daemon=True)
    keeper.start()
    screen.line(f"serving the link on {listen}; its state is in {state}")
    try:
        serve_link(host, int(port), federation, state / "link.db", secret)
    finally:
        stopping.set()
        keeper.join(timeout=5)


def client(
    kit: Annotated[Path, typer.Option(metavar="DIR", envvar="PPLR_KIT", help="This client's startup kit.")],
    data: Annotated[Path, typer.Option(metavar="PATH", help="Its own data; they are read here and never sent.")],
    connect: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server's link is.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="This client's state: adapters, optimizer, its best adapter.")
    ] = Path("client"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field of a run here. Repeatable."),
    ] = None,
) -> None:
    """Take part in a federation's runs with this machine's own data, until stopped."""
    from pplr.apps.terminal import Screen, TerminalProgress

    wait_passively()
    screen = Screen()
    with screen.busy("loading libraries"):
        from pplr.runtimes.flower_node import run_node
    own = [f"data.path={json.dumps(str(data.resolve()))}", *(settings or ())]
    with _until_stopped() as stopping:
        run_node(kit, connect, folder, own, TerminalProgress(screen), stopping)
    screen.line("stopped")


@contextmanager
def _until_stopped() -> Iterator[threading.Event]:
    """Set an event when this process is told to end."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    yield stopping
