"""A federation through Flower on this machine: a link, and clients as processes, each with its own users' data."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pplr.config import Config
from pplr.data.sources.registry import source_folder
from pplr.runtimes.identity import enroll_client, init_federation
from pplr.runtimes.run_data import load_run_data

HOST = "127.0.0.1"
_PATIENCE_S = 180.0


def split_movielens(config: Config, into: Path) -> list[str]:
    """Give every client of a partition of MovieLens-100K a folder with its own users' ratings, and all items.

    Returns:
        The clients' names.
    """
    data = load_run_data(config)
    source = next(source_folder("movielens-100k").rglob("ml-100k.inter")).parent
    for name, users in zip(data.partition.names, data.partition.users, strict=True):
        kept, folder = {data.dataset.user_ids[user] for user in users}, into / name
        folder.mkdir(parents=True)
        shutil.copy(source / "ml-100k.item", folder)
        for part in ("ml-100k.user", "ml-100k.inter"):
            header, *lines = (source / part).read_text(encoding="utf-8").splitlines(keepends=True)
            own = "".join(line for line in lines if line.split("\t")[0] in kept)
            (folder / part).write_text(header + own, encoding="utf-8")
    return list(data.partition.names)


@contextmanager
def federation(config: Config, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Run ``pplr server`` and a ``pplr client`` for each client of a configuration; give what ``train`` needs."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = f"{HOST}:{free.getsockname()[1]}"
    enrolled, state = folder / "federation", folder / "state"
    init_federation(enrolled, "bench", [HOST], address=f"{HOST}:1")
    names = split_movielens(config, folder / "data")
    running: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{name}.log").open("w") as log:
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "pplr.apps.cli", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"FLWR_HOME": str(folder / "flwr" / name)},
            )

    def wait_for(name: str, ready: Callable[[str], bool]) -> None:
        until = time.monotonic() + _PATIENCE_S
        while not ready(told := (folder / f"{name}.log").read_text(errors="replace")):
            if running[name].poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{name} did not start: {told[-2000:]}")
            time.sleep(0.1)

    try:
        for name in names:
            enroll_client(enrolled, name, folder / "kits" / name)
        start("server", "server", "--federation", str(enrolled), "--state", str(state), "--listen", address)
        wait_for("server", lambda told: told.count("may join") == len(names))
        for name in names:
            own = ("--kit", str(folder / "kits" / name), "--data", str(folder / "data" / name))
            start(f"client-{name}", "client", *own, "--server", address, "--folder", str(folder / f"client-{name}"))
        for name in names:
            wait_for(f"client-{name}", lambda told: "is connected to" in told)
        yield enrolled, state
    finally:
        for process in reversed(running.values()):
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
