"""The process that serves the page."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from nicegui import app as pages_app
from nicegui import ui

from pplr.apps.web.desk import Desk
from pplr.apps.web.gate import Gate, is_loopback
from pplr.apps.web.pages import Pages
from pplr.apps.web.standing import Watcher
from pplr.errors import ConfigError
from pplr.runtimes.address import StageServerAt

__all__ = ["bind", "serve"]

_BACKLOG = 128


def serve(
    folder: Path,
    host: str,
    port: int,
    stage_server: StageServerAt | None = None,
    told: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the page of a run until the process is told to stop.

    Args:
        folder: The run's, finished or not.
        host: Address to listen at.
        port: Likewise, 1 to 65535.
        stage_server: Hosts the middle blocks; this process hosts them when absent.
        told: Told where the page is, once it can be opened.

    Raises:
        RunError: It is no run folder.
        ConfigError: The address cannot be listened at.
    """
    desk, watcher = Desk(folder, stage_server), Watcher(folder)
    listening = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    Pages(desk, watcher, is_open=not is_loopback(host)).register()
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(outer, title="pplr", language="en-US", show_welcome_message=False, tailwind=False)
    pages_app.on_startup(lambda: told(f"http://{shown}:{port}"))
    hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else ()
    config = uvicorn.Config(Gate(outer, hosts), log_level="warning", access_log=False, server_header=False)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        listening.close()
        desk.close()


def bind(host: str, port: int) -> socket.socket:
    """Take an address before anything is loaded, so that one that is taken is told at once.

    Raises:
        ConfigError: It is taken, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no address ({error})", cure="Give --host an address of this machine.") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen at {host}, port {port} ({error.strerror})",
            cure="Choose another --port, or an address of this machine for --host.",
        ) from None
    return listening
