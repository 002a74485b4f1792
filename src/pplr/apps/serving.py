"""The two long-lived commands of a federation through Flower: ``pplr server`` and ``pplr client``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["client", "server"]

_STAGE_STOPS_S = 90.0


def server(
    context: typer.Context,
    federation: Annotated[Path, typer.Option(metavar="DIR", help="The federation's folder, of `pplr enroll init`.")],
    state: Annotated[Path, typer.Option(metavar="DIR", help="The server's own folder; made when absent.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen.")] = "0.0.0.0:8000",
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="How this machine reaches it; as it listens when absent.")
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Serve the middle blocks too: a server's bundle of `pplr cut`, or a model."),
    ] = None,
    stage_listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the stage server is to listen.")
    ] = "0.0.0.0:8443",
) -> None:
    """Serve the link over which a federation's clients and its operator meet (Flower's SuperLink).

    With --stage a stage server is started beside it; what follows `--` goes to `pplr stage serve`.
    """
    from pplr.apps.terminal import Screen
    from pplr.runtimes.flower_settings import load_link

    screen = Screen()
    host, _, port = listen.rpartition(":")
    if not (host and port.isdigit()):
        raise typer.BadParameter(f"{listen!r} is not HOST:PORT", param_hint="--listen")
    with screen.busy("loading libraries"):
        load_link()
        from pplr.runtimes.flower_enrolled import keep_nodes, prepare_link
        from pplr.runtimes.flower_link import serve_link
    secret = prepare_link(state, address or f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}")  # noqa: S104
    if context.args and stage is None:
        raise typer.BadParameter(f"{context.args[0]!r} is for a stage server, and --stage names no model")
    stopping, lost = threading.Event(), threading.Event()
    with ExitStack() as closing:
        threading.Thread(target=_insist, args=(_told_to_end(), stopping), daemon=True).start()
        if stage is not None:
            own = [stage, "--federation", str(federation), "--listen", stage_listen, "--state", str(state / "stage")]
            closing.enter_context(_stage_server([*own, *context.args], screen.line, lost))
        keeper = threading.Thread(target=keep_nodes, args=(federation, state, stopping, screen.line), daemon=True)
        keeper.start()
        screen.line(f"serving the link on {listen}; what starts runs over it is in {state}")
        try:
            serve_link(host, int(port), federation, secret)
        finally:
            stopping.set()
            keeper.join(timeout=5)
    if lost.is_set():
        raise typer.Exit(1)
    screen.line("stopped")


def _insist(asked: threading.Event, ended: threading.Event) -> None:
    """Give a signal once more that came before the link's own server listened for it."""
    asked.wait()
    while not ended.wait(1.0):
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _stage_server(arguments: list[str], note: Callable[[str], None], lost: threading.Event) -> Iterator[None]:
    """Run `pplr stage serve` in a process of its own while inside; when it ends by itself, this process ends too.

    A crash of one of the two servers leaves the other's memory alone, and each keeps its state on disk. The other
    process ends when its standard input does, so that it does not stay behind when this one is killed.
    """
    command = [sys.executable, "-m", "pplr.apps.cli", "stage", "serve", "--until-input-ends", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  (our own)
    leaving = threading.Event()

    def watch() -> None:
        status = process.wait()
        if not leaving.is_set():
            note(f"the stage server ended with status {status}: stopping the link too")
            lost.set()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        leaving.set()
        process.terminate()
        try:
            process.wait(_STAGE_STOPS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def client(
    kit: Annotated[Path, typer.Option(metavar="DIR", envvar="PPLR_KIT", help="This client's startup kit.")],
    data: Annotated[Path, typer.Option(metavar="PATH", help="Its own data; they are read here and never sent.")],
    connect: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server's link is.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="This client's state: adapters, optimizer, its best adapter.")
    ] = Path("client"),
    stage_server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where the federation's stage server is; the kit's own when absent."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field of a run here. Repeatable."),
    ] = None,
) -> None:
    """Take part in a federation's runs with this machine's own data, until stopped."""
    from pplr.apps.terminal import Screen, TerminalProgress
    from pplr.runtimes.flower_settings import load_flower

    screen = Screen()
    with screen.busy("loading libraries"):
        load_flower()
        from pplr.runtimes.flower_node import run_node
    own = [f"data.path={json.dumps(str(data.resolve()))}", *(settings or ())]
    run_node(kit, connect, folder, own, TerminalProgress(screen), _told_to_end(), stage_server)
    screen.line("stopped")


def _told_to_end() -> threading.Event:
    """Make an event that is set once this process is told to end."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    return stopping
