"""A client of a federation through Flower, on its own machine, with its own data."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pplr.config_files import load_config
from pplr.errors import FederationError, ServerLostError, WireError
from pplr.progress import Progress
from pplr.runtimes.address import StageServerAt
from pplr.runtimes.certificates import openssh_key, write_private
from pplr.runtimes.flower_settings import load_flower
from pplr.runtimes.identity import Kit, read_kit
from pplr.runtimes.orders import run_token
from pplr.runtimes.parcels import Parcel
from pplr.runtimes.participant import Participant
from pplr.runtimes.run import open_run
from pplr.runtimes.run_folder import write_own
from pplr.storage import write_atomic

if TYPE_CHECKING:
    from flwr.app import Context

    from pplr.runtimes.assembly import Assembly

__all__ = ["OwnClient", "run_node"]

_TOKEN = re.compile(r"[0-9a-f]{16}")
_TOLD = "server.yaml"
"""The configuration as the server told it."""
_START_S = 60.0
_STOP_S = 10.0
_REJOIN_S, _AGAIN_S = 120.0, 5.0
"""The link takes a node that was killed for a living one, and lets no second one in, for about a minute."""


class OwnClient:
    """Answers orders with this client's own data; the model stays in memory from one to the next.

    Args:
        name: The enrolled name.
        folder: Of its state: a folder for each run, with its optimizer, its adapters and its best one.
        settings: What this client sets itself, over the run's configuration: where its data are above all.
        progress: Told of every step.
        stage_server: Where the federation's stage server is, by this client's kit, for runs that use it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Sequence[str],
        progress: Progress,
        stage_server: StageServerAt | None = None,
    ) -> None:
        self._name, self._folder, self._settings, self._progress = name, folder, tuple(settings), progress
        self._stage_server = stage_server
        self._token: str | None = None
        self._assembly: Assembly | None = None
        self._participant: Participant | None = None

    def __call__(self, context: Context, order: bytes) -> bytes:
        """Answer an order; where the stage server was lost on the way, the next one begins with new connections."""
        parcel = Parcel.unpack(order, whose="the server")
        try:
            return self._participant_of(parcel).answer(parcel).pack()
        except ServerLostError:
            self.close()
            raise

    def _participant_of(self, parcel: Parcel) -> Participant:
        """Make ready for the run that an order is of; one that is ready stays so.

        A greeting brings the run's configuration. Later orders name it: a client that was started again finds it in
        its own folder. That is a run folder like any other, of this client alone: with the configuration as it counts
        here, and in the end its best adapter.
        """
        told = parcel.told.get("config")
        token = run_token(told) if isinstance(told, str) else str(parcel.told.get("run"))
        if self._participant is not None and token == self._token:
            return self._participant
        if not _TOKEN.fullmatch(token):
            raise WireError("an order that names no run", cure="Use the same version of pplr on both sides.")
        run = self._folder / token
        if isinstance(told, str):
            write_atomic(run / _TOLD, told.encode())
            config = load_config(run / _TOLD, self._settings)
            write_own(run, config, self._name, hosted=parcel.told.get("hosted") is True)
        elif not (run / _TOLD).exists():
            raise WireError(f"an order of a run {token} that this client never joined", cure="Start the run again.")
        self.close()
        own = open_run(run, self._stage_server)
        self._progress.note(f"taking part in a run of {own.config.federation.method}; its folder is {run}")
        self._assembly = own.assembly(self._progress)
        self._token = token
        export = run / "clients" / self._name
        self._participant = Participant(self._assembly, self._name, run / "state", export, self._progress.note)
        return self._participant

    def close(self) -> None:
        """Let go of the model and the data."""
        assembly, self._assembly, self._participant, self._token = self._assembly, None, None, None
        if assembly is not None:
            assembly.close()


def run_node(
    kit: Path,
    server: str,
    folder: Path,
    settings: Sequence[str],
    progress: Progress,
    stopping: threading.Event,
    stage_server: str | None = None,
) -> None:
    """Take part in the runs of a federation, until told to stop.

    Args:
        kit: This client's startup kit.
        server: HOST:PORT of the federation's link.
        folder: Of its state; made when absent.
        settings: What this client sets itself.
        progress: Told of every step.
        stopping: Ends this.
        stage_server: HOST:PORT of the federation's stage server; the kit's own when absent.

    Raises:
        IdentityError: The kit cannot be used.
        FederationError: The link did not let this client in for two minutes.
    """
    load_flower()
    from pplr.runtimes import flower, flower_link

    own = read_kit(kit)
    client = OwnClient(own.name, folder / "runs", settings, progress, StageServerAt(kit, stage_server))
    app = flower.make_client_app(client)
    try:
        until = time.monotonic() + _REJOIN_S
        while not stopping.is_set():
            began = time.monotonic()
            with _node(own, server, folder, progress) as (address, secret, process):
                ended = threading.Event()
                threading.Thread(target=_watch, args=(process, stopping, ended), daemon=True).start()
                flower_link.answer_messages(address, secret, app, ended, progress.note)
                if stopping.is_set():
                    return
                if time.monotonic() - began > _REJOIN_S:  # it was let in, and lost the link since
                    until = time.monotonic() + _REJOIN_S
                if time.monotonic() > until:
                    raise _ended(process, folder)
            progress.note(
                "the link does not let this client in (yet): it may still think that it is there. Trying again"
            )
            stopping.wait(_AGAIN_S)
    finally:
        client.close()


def _watch(process: subprocess.Popen[bytes], stopping: threading.Event, ended: threading.Event) -> None:
    """Set an event once a process has ended, or this client is to stop."""
    while process.poll() is None and not stopping.wait(0.2):
        pass
    ended.set()


def _ended(process: subprocess.Popen[bytes], folder: Path) -> FederationError:
    log = folder / "node.log"
    return FederationError(
        f"Flower's node ended with status {process.returncode}", cure=f"See {log}: the link may refuse this kit."
    )


@contextlib.contextmanager
def _node(
    kit: Kit, server: str, folder: Path, progress: Progress
) -> Iterator[tuple[str, bytes, subprocess.Popen[bytes]]]:
    """Run Flower's node, which holds the connection to the link, as long as inside."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, ca, shared = folder / "node.key", folder / "ca.crt", folder / "node.secret"
    secret = secrets.token_hex(32).encode()
    write_private(key, openssh_key(kit.key_pem))
    write_private(shared, secret)
    write_atomic(ca, kit.ca_pem)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    program = shutil.which("flower-supernode", path=str(Path(sys.executable).parent)) or "flower-supernode"
    command = [program, "--superlink", server, "--root-certificates", str(ca), "--isolation", "process"]
    command += [
        "--auth-supernode-private-key",
        str(key),
        "--port",
        str(port),
        "--superexec-auth-secret-file",
        str(shared),
    ]
    with (folder / "node.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)  # noqa: S603  (our own)
    try:
        _wait_for(port, process, folder)
        progress.note(f"client {kit.name} of {kit.federation} is connected to {server}")
        yield f"127.0.0.1:{port}", secret, process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        key.unlink(missing_ok=True)


def _wait_for(port: int, process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + _START_S
    while True:
        if process.poll() is not None:
            raise _ended(process, folder)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > until:
            raise FederationError("Flower's node did not start", cure=f"See {folder / 'node.log'}.")
        time.sleep(0.1)
